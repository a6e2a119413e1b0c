from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from pipeline.prepare.sources.yaib import Yaib
from tests.pipeline.prepare.sources.conftest import Tabulate


def write(folder: Path, **outcomes: pl.Series) -> Yaib:
    hours = pl.Series([timedelta(hours=hour) for hour in (0, 1)], dtype=pl.Duration("ms"))
    pl.DataFrame({"stay_id": [1, 1], "time": hours, "hr": [80.0, 81.0]}).write_parquet(folder / "dyn.parquet")
    pl.DataFrame(outcomes).write_parquet(folder / "outc.parquet")
    return Yaib(path=folder)


def test_an_outcome_of_a_stay(tmp_path: Path, tabulate: Tabulate) -> None:
    labels = write(tmp_path, stay_id=pl.Series([1, 2], dtype=pl.Int32), label=pl.Series([0, 1])).read_labels()
    assert labels is not None
    assert labels.time_column is None
    assert tabulate(labels).rows() == [("1", 0), ("2", 1)]


@pytest.mark.parametrize("unit", [None, "hours"])
def test_an_outcome_of_each_hour(tmp_path: Path, unit: str | None, tabulate: Tabulate) -> None:
    hours = [0, 5]
    time = pl.Series(hours) if unit else pl.Series([timedelta(hours=hour) for hour in hours], dtype=pl.Duration("ms"))
    write(tmp_path, stay_id=pl.Series([1, 1]), time=time, label=pl.Series([False, True]))
    labels = Yaib(path=tmp_path, time_unit=unit).read_labels()  # type: ignore[arg-type]
    assert labels is not None
    assert labels.time_column == "prediction_minute"
    assert tabulate(labels).select("patient_id", "prediction_minute", "label").rows() == [
        ("1", 0.0, 0),
        ("1", 300.0, 1),
    ]


def test_labels_of_one_s_own_win(tmp_path: Path, tabulate: Tabulate) -> None:
    write(tmp_path, stay_id=pl.Series([1]), label=pl.Series([0]))
    (tmp_path / "own.csv").write_text("stay_id,label\n1,1\n")
    labels = Yaib(path=tmp_path, labels=tmp_path / "own.csv").read_labels()
    assert labels is not None
    assert tabulate(labels).rows() == [("1", 1)]
    (tmp_path / "outc.parquet").unlink()
    assert Yaib(path=tmp_path).read_labels() is None
