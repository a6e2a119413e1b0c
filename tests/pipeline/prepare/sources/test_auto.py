from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.prepare.sources.auto import FORMATS, detect_format, open_source
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table
from pipeline.schema import UserError


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("train/200001.0.parquet", "patient_files"),
        ("132539.txt", "physionet2012"),
        ("events.csv.gz", "table"),
        ("deep/er/events.parquet", "table"),
    ],
)
def test_a_folder_is_known_by_what_lies_in_it(tmp_path: Path, file: str, found: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert detect_format(tmp_path) == found
    assert open_source(tmp_path, "auto", {}).name == found


def test_a_file_and_a_pattern_are_tables(tmp_path: Path) -> None:
    (tmp_path / "1.csv").touch()
    assert isinstance(open_source(tmp_path / "1.csv", "auto", {}), Table)
    assert isinstance(open_source(tmp_path / "*.csv", "auto", {}), Table)


def test_the_bare_word_makes_patients_up() -> None:
    assert open_source(Path("synthetic"), "auto", {"num_patients": 3}) == Synthetic(num_patients=3)


def test_every_format_can_be_asked_for_by_name(tmp_path: Path) -> None:
    for name in FORMATS:
        assert open_source(tmp_path, name, {}).name == name


@pytest.mark.parametrize(
    ("path", "name", "options", "message"),
    [
        (".", "auto", {}, "nothing here that any format reads"),
        ("missing", "auto", {}, "missing: no such file or folder"),
        ("missing", "physionet2012", {}, "missing: no such file or folder"),
        ("file", "patient_files", {}, "file: not a folder"),
        (".", "synthetic", {"labels": Path("x")}, "--labels: not used by --format synthetic"),
        (".", "table", {"profile": "icu"}, "--profile: not used by --format table"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, path: str, name: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / path, name, options)
