from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import meds
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import preprocess
from pipeline.dataset.manifest import Manifest
from pipeline.loading.loader import make_loader
from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.reference import ReferenceDataSet
from pipeline.prepare.rules import Range, Rules
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.table import Table
from pipeline.prepare.splits import SplitRule
from pipeline.schema import SPLITS, UserError
from tests.prepared import read_prepared

RULES = Rules(
    ranges={"v1": Range(low=-1.0, high=50.0, action="reject")},
    outlier_std=1.5,
    outlier_action="clip",
    aggregate="last",
    min_events=4,
    min_count=85,
)
OPTIONS = BuildOptions(split_rule=SplitRule(split_fractions=(0.5, 0.2, 0.3)), rules=RULES)


def some_rows(num_rows: int = 4000) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    variable = rng.integers(0, 12, num_rows) * rng.integers(0, 2, num_rows)  # v0 is frequent
    return pl.DataFrame(
        {
            "patient_id": [f"p{number}" for number in rng.integers(0, 300, num_rows)],
            "minute": rng.integers(0, 300, num_rows) / 4,
            "variable": [f"v{number}" for number in variable],
            "value": rng.normal(size=num_rows) * (1 + variable),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in ``data``, and its input in ``rows.parquet``."""
    folder = tmp_path_factory.mktemp("like")
    some_rows().write_parquet(folder / "rows.parquet")
    (folder / "cached.csv").write_text("Key,0,1\n" + "".join(f"v{number},{number},1\n" for number in range(12)))
    build(Table(path=folder / "rows.parquet", embeddings=folder / "cached.csv"), folder / "data", OPTIONS)
    return folder / "data"


def prepare(rows: pl.DataFrame, folder: Path, data: Path, split: str = "test") -> dict[str, Any]:
    rows.write_parquet(folder / "new.parquet")
    like = ReferenceDataSet.open(data)
    options = BuildOptions(split_rule=SplitRule.all_in(split), rules=like.rules({}), reference=like)
    return build(like.adapt_source(Table(path=folder / "new.parquet"), {}), folder / "new", options)


def test_patients_become_what_they_are_in_the_data_set_itself(tmp_path: Path, data: Path) -> None:
    """Any of its patients, prepared alone: the same codes and values to the bit."""
    rows = pl.read_parquet(data.parent / "rows.parquet")
    stored = read_prepared(data)
    assert stored.rejects.keys() == {"out_of_range", "aggregated", "short_patient"}
    assert len([row for row in stored.vocabulary if row[0].startswith("v")]) < 12
    test = [name for name, *_ in stored.patients["test"]]
    assert len(test) > 50
    summary = prepare(
        rows.filter(pl.col("patient_id").is_in(test)).sample(fraction=1, shuffle=True, seed=0), tmp_path, data
    )
    new = read_prepared(tmp_path / "new")
    assert new.patients == {"train": [], "valid": [], "test": stored.patients["test"]}
    assert new.vocabulary == stored.vocabulary
    assert summary["clipped"]["outlier"] > 0
    assert summary["unknown_variable_events"] > 0


def test_checkpoint_and_loader_find_what_they_need(tmp_path: Path, data: Path) -> None:
    prepare(some_rows(500), tmp_path, data)
    old, new = Manifest.load(data), Manifest.load(tmp_path / "new")
    assert (new.vocabulary_fingerprint, new.num_codes, new.embedding_dim) == (
        old.vocabulary_fingerprint, old.num_codes, 2,
    )  # fmt: skip
    for name in ("vocabulary.parquet", "embeddings.npy"):
        assert (tmp_path / "new" / name).read_bytes() == (data / name).read_bytes()
    assert list(new.splits) == sorted(SPLITS)
    assert new.fingerprint != old.fingerprint
    assert new.options["like"] == old.fingerprint
    assert Rules.from_options(new.options) == RULES
    assert not list(make_loader(tmp_path / "new", task=None, split="train", batch_size=4))
    assert list(make_loader(tmp_path / "new", task=None, split="test", batch_size=4))


def test_unknown_variables_are_counted_the_most_frequent_first(tmp_path: Path, data: Path) -> None:
    names = [f"new{number:03d}" for number in range(150) for _ in range(1 + number // 2)] + ["v0"] * 4
    random.Random(0).shuffle(names)
    rows = pl.DataFrame({"patient_id": "p", "minute": range(len(names)), "variable": names, "value": 1.0})
    summary = prepare(rows, tmp_path, data, split="valid")
    assert summary["unknown_variable_events"] == len(names) - 4
    assert list(summary["unknown_variables"].items())[:3] == [("new148", 75), ("new149", 75), ("new146", 74)]
    assert len(summary["unknown_variables"]) == 100
    assert summary["splits"]["valid"]["patients"] == 1


def test_given_splits_and_statistics_do_not_count(tmp_path: Path, data: Path) -> None:
    for split in SPLITS:
        (tmp_path / "in" / split).mkdir(parents=True)
        frame = pl.DataFrame({"variable": ["v2"] * 5, "value": [9.0, 1, 2, 3, 4], "minute": range(5)})
        frame.write_parquet(tmp_path / "in" / split / f"{split}.parquet")
    (tmp_path / "in" / "stats.csv").write_text("variable,mean,std\nv2,100,1\n")
    like = ReferenceDataSet.open(data)
    options = BuildOptions(split_rule=SplitRule.all_in("train"), rules=like.rules({}), reference=like)
    summary = build(PatientFiles(path=tmp_path / "in"), tmp_path / "new", options)
    assert summary["splits"]["train"]["patients"] == 3
    assert summary["variables_with_given_statistics"] == 0
    assert read_prepared(tmp_path / "new").vocabulary == read_prepared(data).vocabulary


def test_input_without_a_single_event_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="no event that can be used"):
        prepare(some_rows(3), tmp_path, data)  # short patients all
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aggregate", "mean"], "--aggregate: .* was prepared with 'last'"),
        (["--outlier_std", "3"], "--outlier_std: .* was prepared with 1.5"),
        (["--ranges", "ranges.csv"], "--ranges: .* was prepared with"),
        (["--split_fractions", "0.5,0.2,0.3"], "--split_fractions: not used with --like"),
        (["--split_seed", "0"], "--split_seed: not used with --like"),
        (["--embeddings", "x.csv"], "--embeddings: not used with --like"),
        (["--like_split", "all"], "--like_split: invalid choice"),
        (["--like", "nowhere"], "manifest.json: no manifest here"),
    ],
)
def test_flags_that_contradict_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path,
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    some_rows(50).write_parquet("new.parquet")
    Path("ranges.csv").write_text("variable,low,high\nHR,1,2\n")
    assert preprocess.main(["new.parquet", "--output", "new", "--like", str(data), *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("preprocess.py: ")]
    assert re.search(message, line), line
    assert not Path("new").exists()


def test_a_flag_that_agrees_is_taken(tmp_path: Path, data: Path) -> None:
    some_rows(1000).write_parquet(tmp_path / "new.parquet")
    arguments = [tmp_path / "new.parquet", "--output", tmp_path / "new", "--like", data, "--aggregate", "last"]
    assert preprocess.main([*map(str, arguments), "--min_events", "4", "--workers", "1"]) == 0


def test_a_damaged_data_set_is_no_measure(tmp_path: Path, data: Path) -> None:
    for name in ("manifest.json", "vocabulary.parquet"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    with pytest.raises(UserError, match=r"embeddings\.npy: is missing"):
        ReferenceDataSet.open(tmp_path)


def test_what_meds_events_are_comes_from_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table(
        {
            "subject_id": [1, 1, 1, 2],
            "time": pa.array([0, 60_000_000, 120_000_000, 0], pa.timestamp("us")),
            "code": ["A", "B", "DEATH", "A"],
            "numeric_value": pa.array([1, 2, 3, 4], pa.float32()),
        }
    )
    meds.DataSchema.validate(table)
    (tmp_path / "in" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "in" / "data" / "0.parquet")

    def run(output: str, *flags: str) -> int:
        return preprocess.main([str(tmp_path / "in"), "--output", str(tmp_path / output), "--workers", "1", *flags])

    chosen = ["--origin_code", "B", "--exclude_codes", "none"]
    assert run("old", "--split_fractions", "1,0,0", *chosen) == 0
    assert run("new", "--like", str(tmp_path / "old")) == 0
    assert run("same", "--like", str(tmp_path / "old"), *chosen) == 0
    for name in ("new", "same"):
        new = Manifest.load(tmp_path / name)
        assert (new.options["origin_code"], new.options["exclude_codes"]) == ("B", [])
        assert json.loads((tmp_path / name / "summary.json").read_text())["rejects"] == {"no_origin": 1}
    assert run("other", "--like", str(tmp_path / "old"), "--exclude_codes", "^B") == 2
    assert "--exclude_codes: " in capsys.readouterr().err
