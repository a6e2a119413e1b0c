from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.prepare.sources.side_files import read_embeddings, read_statistics
from pipeline.schema import UserError

VARIABLES = ["<padding>", "<unknown>", "HR", "RR"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


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
