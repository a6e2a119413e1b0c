from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.prepare.sources.physionet2019 import PhysioNet2019
from pipeline.schema import UserError
from tests.pipeline.prepare.sources.conftest import Tabulate

HEADER = "HR|Age|ICULOS|SepsisLabel\n"


def write(folder: Path, **records: str) -> PhysioNet2019:
    for name, text in records.items():
        (folder / f"{name}.psv").write_text(text)
    return PhysioNet2019(path=folder)


def test_each_hour_is_a_sample(tmp_path: Path, tabulate: Tabulate) -> None:
    source = write(tmp_path, p2=HEADER + "80|60|2|0\n81|60|3|1\n82|60|NaN|1\nNaN|60|4|NaN\n", p1=HEADER + "90|50|1|0\n")
    labels = source.read_labels()
    assert labels is not None
    assert labels.time_column == "prediction_minute"
    assert tabulate(labels).select("patient_id", "prediction_minute", "label").rows() == [
        ("p1", 60.0, 0),
        ("p2", 120.0, 0),
        ("p2", 180.0, 1),
        ("p2", 240.0, None),
    ]


def test_records_without_labels_make_no_task_and_labels_of_one_s_own_win(tmp_path: Path, tabulate: Tabulate) -> None:
    assert write(tmp_path, p1="HR|ICULOS\n80|1\n").read_labels() is None
    (tmp_path / "own.csv").write_text("patient_id,label\np1,1\n")
    labels = PhysioNet2019(path=tmp_path, labels=tmp_path / "own.csv").read_labels()
    assert labels is not None
    assert tabulate(labels).rows() == [("p1", 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("80|60|1|0\n81|60|2|2\n", "p2.psv: row 2, column 'SepsisLabel': a label is 0, 1"),
        ("80|60|1|0\n81|60|1|1\n", "p2.psv: rows 1 to 2 give one sample two labels"),
    ],
)
def test_a_label_that_cannot_be_used_is_named_by_its_record(tmp_path: Path, rows: str, message: str) -> None:
    source = write(tmp_path, p1=HEADER + "90|50|1|0\n", p2=HEADER + rows)
    with pytest.raises(UserError, match=message):
        source.read_labels()
