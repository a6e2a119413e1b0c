"""Codes with what ``metadata`` says of them: modifiers joined, parents in their place; labels that are read once."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import preprocess
from pipeline.prepare.build import build
from pipeline.prepare.sources import meds
from pipeline.prepare.sources.meds import Meds
from pipeline.schema import UserError
from tests.pipeline.prepare.sources.test_meds import (
    ADMISSION,
    ALL_TRAIN,
    Event,
    stays,
    write,
    write_events,
    write_samples,
)

CODES = {
    "MEDS_BIRTH": ["LOINC/birth"],
    "LAB//1": ["ICD/a", "LOINC/fine"],
    "LAB//2": ["mine/x"],
    "mine/x": ["mine/y", "LAB//2"],  # a loop
    "mine/y": ["LOINC/far"],
    "LOINC/fine": ["LOINC/coarse"],
    "ICD/a": ["LOINC/farther"],
    "OTHER": None,
    "HOSPITAL_DISCHARGE//DIED": ["LOINC/dead"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    codes = ["MEDS_BIRTH", "LAB//1", "LAB//2", "LOINC/fine", "OTHER", "unheard", "HOSPITAL_DISCHARGE//DIED"]
    events: list[Event] = [(1, ADMISSION, code, float(number)) for number, code in enumerate(codes)]
    unit = pa.array([None, "mg", "mg ", "", "kg", None, None], pa.string())
    texts = pa.array(["x", None, "y", None, None, None, None], pa.large_string())
    write_events(tmp_path / "in", events, text_value=texts, unit=unit, rank=pa.array([1.0, None, 2.0] + [None] * 4))
    table = {"code": list(CODES), "description": list(CODES), "parent_codes": list(CODES.values())}
    write(pa.table(table), tmp_path / "in" / "metadata" / "codes.parquet")
    return tmp_path / "in"


def variables(root: Path, output: Path, **options: Any) -> list[str]:
    build(Meds(path=root, **options), output, ALL_TRAIN)
    ((_, names),) = stays(output)["1"]
    return sorted(names)


def test_codes_become_their_nearest_parent_of_a_vocabulary(root: Path, tmp_path: Path) -> None:
    others = ["HOSPITAL_DISCHARGE//DIED", "LOINC/fine", "MEDS_BIRTH", "OTHER", "unheard"]
    assert variables(root, tmp_path / "1", roll_up=("LOINC",)) == sorted([*others, "LOINC/fine", "LOINC/far"])
    assert variables(root, tmp_path / "2", roll_up=("ICD", "mine")) == sorted([*others, "ICD/a", "mine/x"])
    vocabulary = pl.read_parquet(tmp_path / "1" / "vocabulary.parquet")
    assert dict(vocabulary.select("variable", "description").iter_rows())["LOINC/fine"] == "LOINC/fine"
    kept = variables(root, tmp_path / "3", roll_up=("LOINC",), exclude_codes=("^LAB//1$",))
    assert kept == sorted([*others, "LOINC/far"])


def test_a_vocabulary_that_no_code_has_a_parent_of_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--roll_up SNOMED: no code of .*codes.parquet has such a parent; name one of ICD"
    ):
        build(Meds(path=root, roll_up=("SNOMED",)), tmp_path / "out", ALL_TRAIN)
    (root / "metadata" / "codes.parquet").unlink()
    with pytest.raises(UserError, match=r"codes.parquet: no such file"):
        build(Meds(path=root, roll_up=("LOINC",)), tmp_path / "out", ALL_TRAIN)
    assert not (tmp_path / "out").exists()


def test_modifiers_are_joined_to_the_code(root: Path, tmp_path: Path) -> None:
    named = ["HOSPITAL_DISCHARGE//DIED", "LAB//1//mg", "LAB//2//mg", "LOINC/fine", "MEDS_BIRTH", "OTHER//kg", "unheard"]
    assert variables(root, tmp_path / "1", code_modifiers=("unit",)) == named
    (root / "metadata" / "dataset.json").write_text(json.dumps({"code_modifier_columns": ["unit", "rank"]}))
    both = [
        "HOSPITAL_DISCHARGE//DIED",
        "LAB//1//mg",
        "LAB//2//mg//2",
        "LOINC/fine",
        "MEDS_BIRTH//1",
        "OTHER//kg",
        "unheard",
    ]
    assert variables(root, tmp_path / "2", code_modifiers=("declared",)) == both
    rolled = variables(root, tmp_path / "3", code_modifiers=("unit",), roll_up=("LOINC",))
    assert "LOINC/fine//mg" in rolled
    with pytest.raises(UserError, match=r"no column 'units'"):
        build(Meds(path=root, code_modifiers=("units",)), tmp_path / "4", ALL_TRAIN)


@pytest.mark.parametrize(
    "content",
    ["{", '{"code_modifier_columns": "unit"}', '{"code_modifier_columns": [1]}', '{"site_id_columns": "hospital"}'],
)
def test_a_damaged_declaration_is_refused(root: Path, tmp_path: Path, content: str) -> None:
    (root / "metadata" / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset.json: "):
        build(Meds(path=root, code_modifiers=("declared",)), tmp_path / "out", ALL_TRAIN)


def test_what_is_not_read_is_said(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "metadata" / "dataset.json").write_text(json.dumps({"code_modifier_columns": ["unit"]}))
    flags = ["--output", str(tmp_path / "out"), "--split_fractions", "1,0,0"]
    assert preprocess.main([str(root), *flags]) == 0
    said = capsys.readouterr().err
    assert f"{root / 'data'}: 2 events have a text_value, which is not read" in said
    assert "declares unit, which is left alone; --code_modifiers declared joins them to the code" in said
    assert preprocess.main([str(root), *flags, "--overwrite", "--roll_up", "LOINC"]) == 0
    assert "--roll_up: 5 codes become 3, if they occur" in capsys.readouterr().err


def test_labels_are_read_once_for_all_pieces(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_events(root, [(number, ADMISSION + timedelta(hours=1), "HR", 80.0)], f"train/{number + 1}")
    write_samples(tmp_path / "task", [(1, ADMISSION, True), (2, ADMISSION + timedelta(days=1), False)])
    monkeypatch.setattr("pipeline.prepare.sources.reading.PIECE_BYTES", 1)
    read, times = meds.read_label_patients, []
    monkeypatch.setattr(meds, "read_label_patients", lambda *given: (times.append(given), read(*given))[1])
    source = Meds(path=root, labels=tmp_path / "task", labelled_only=True)
    assert len(source.pieces()) == 4
    summary = build(source, tmp_path / "out", ALL_TRAIN)
    assert summary["rejects"] == {"no_sample": 1}
    assert len(times) == 1
    write_samples(tmp_path / "task", [(0, ADMISSION + timedelta(days=1), True)], "more")
    assert "no_sample" not in build(source, tmp_path / "again", ALL_TRAIN)["rejects"]
