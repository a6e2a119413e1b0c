from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.prepare.sources.side_files import read_embeddings, read_labels, read_statistics
from pipeline.schema import UserError

VARIABLES = ["<padding>", "<unknown>", "HR", "RR"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_labels_are_zero_one_or_none(tmp_path: Path) -> None:
    text = "patient_id,label\na,0\nb,1.0\nc,\nd,-1\ne,TRUE\nf, 0 \ng,nan\nh,\nh,1\nh,1\n,1\n"
    expected = {"a": 0, "b": 1, "c": None, "d": None, "e": 1, "f": 0, "g": None, "h": 1}
    assert dict(read_labels(write(tmp_path / "1.csv", text)).iter_rows()) == expected
    frame = pl.DataFrame({"subject_id": [1, 2, 3], "boolean_value": [True, False, None]})
    frame.write_parquet(tmp_path / "1.parquet")
    assert read_labels(tmp_path / "1.parquet", "boolean_value").rows() == [("1", 1), ("2", 0), ("3", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient_id,label\na,0\na,1\n", "rows 1 to 2 give a patient both label 0 and label 1"),
        ("patient_id,label\na,2\n", "row 1, column 'label': a label is 0, 1"),
        ("patient_id,label\na,yes\n", "row 1, column 'label': a label is 0, 1"),
        ("patient_id,died\na,1\n", "no column 'label' or .*--label_column"),
        ("who,label\na,1\n", "no column 'patient_id' or"),
        ("", "cannot be read"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"1\.csv: .*{message}"):
        read_labels(write(tmp_path / "1.csv", text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.csv", tmp_path / "no.parquet"):
        with pytest.raises(UserError, match=r"no\.(csv|parquet): no such file"):
            read_labels(path)


def test_statistics(tmp_path: Path) -> None:
    text = "variable,mean,std,more\nHR,80,12.5,x\nRR,18,0,x\nT,37,,x\npH,,1,x\n"
    assert read_statistics(write(tmp_path / "1.csv", text)) == {"HR": (80, 12.5), "RR": (18, 1), "T": (37, 1)}
    for text, message in (
        ("variable,mean\n", "no column 'std'"),
        ("variable,mean,std\na,1,1\na,2,1\n", "'a' stands there 2 times"),
    ):
        with pytest.raises(UserError, match=message):
            read_statistics(write(tmp_path / "1.csv", text))


def test_embeddings(tmp_path: Path) -> None:
    vectors = read_embeddings(write(tmp_path / "1.csv", "Key,0,1\nRR,3,4\nother,x,y\nHR,1,2\n"), VARIABLES)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[0, 0], [0, 0], [1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Key,0\nHR,1\n", "no vector for variable 'RR'"),
        ("Key,0\nHR,1\nRR,x\n", "vector of variable 'RR' is not all finite"),
        ("Key,0\nHR,inf\nRR,1\n", "vector of variable 'HR' is not all finite"),
        ("Key,0\nHR,1\nRR,1\nHR,2\n", "'HR' stands there 2 times"),
        ("Name,0\nHR,1\n", "no column 'Key'"),
        ("Key\nHR\nRR\n", "no numbers"),
    ],
)
def test_embeddings_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_embeddings(write(tmp_path / "1.csv", text), VARIABLES)
