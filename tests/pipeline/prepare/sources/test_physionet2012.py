from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from pipeline.prepare.clean import clean
from pipeline.prepare.sources.label_files import LabelColumns
from pipeline.prepare.sources.labels import read_labels
from pipeline.prepare.sources.physionet2012 import PhysioNet2012
from pipeline.schema import UserError
from tests.pipeline.prepare.sources.conftest import Tabulate

HEADER = "Time,Parameter,Value\n"


def write(folder: Path, **records: str) -> PhysioNet2012:
    folder.mkdir(exist_ok=True)
    for name, rows in records.items():
        (folder / f"{name.removeprefix('r')}.txt").write_bytes(rows.encode())
    return PhysioNet2012(path=folder)


def read(source: PhysioNet2012) -> tuple[pl.DataFrame, pl.DataFrame, tuple[str, ...]]:
    (piece,) = source.pieces()
    (raw,) = source.read(piece)
    kept, rejected = clean(raw)
    assert kept.height + rejected.height == raw.rows.height
    return kept, rejected, raw.patients


def test_records_by_hand(tmp_path: Path) -> None:
    source = write(
        tmp_path / "set-a",
        r12=HEADER
        + "00:00,RecordID,12\n00:00,Gender,0\n00:00,Height,-1\n00:00,Weight,-1.0\n07:05,HR,-1\n48:00,HR,61.5\n",
        r13=HEADER
        + "00:00,RecordID,13\n\n24:60,HR,1\n7,HR,1\n01:00,,1\n01:00,HR,\n01:00,HR,x\n01:00,HR,1,extra\n01:00\n",
        r14=HEADER.replace("\n", "\r\n") + "00:00,RecordID,14\r\n00:01,HR,5",  # no line feed at the end
        r15=HEADER,
    )
    (tmp_path / "set-a" / "README.txt").write_text("not a record")
    kept, rejected, patients = read(source)
    assert patients == ("12", "13", "14", "15")
    assert kept.select("file", "row", "patient_id", "minute", "variable", "value").rows() == [
        (0, 2, "12", 0.0, "Gender", 0.0),
        (0, 5, "12", 425.0, "HR", -1.0),  # -1 means missing for three descriptors only
        (0, 6, "12", 2880.0, "HR", 61.5),
        (1, 6, "13", 60.0, "HR", None),
        (1, 8, "13", 60.0, "HR", 1.0),
        (2, 2, "14", 1.0, "HR", 5.0),
    ]
    assert rejected.select("file", "row", "reason", "minute", "variable", "value").rows() == [
        (0, 1, "record_id", "00:00", "RecordID", "12"),
        (0, 3, "missing_code", "00:00", "Height", "-1"),
        (0, 4, "missing_code", "00:00", "Weight", "-1.0"),
        (1, 1, "record_id", "00:00", "RecordID", "13"),
        (1, 2, "no_variable", None, None, None),
        (1, 3, "bad_minute", "24:60", "HR", "1"),
        (1, 4, "bad_minute", "7", "HR", "1"),
        (1, 5, "no_variable", "01:00", None, "1"),
        (1, 7, "bad_value", "01:00", "HR", "x"),
        (1, 9, "no_variable", "01:00", None, None),
        (2, 1, "record_id", "00:00", "RecordID", "14"),
    ]


def test_labels_of_patients_who_died_later_are_soft(tmp_path: Path, tabulate: Tabulate) -> None:
    """On the day of leaving 0.35, after 120 days 1/e of that; of an unknown stay days count from admission."""
    source = write(tmp_path / "set-a", r1=HEADER)
    path = tmp_path / "Outcomes-a.txt"
    rows = ["1,5,5,0", "2,10,130,0", "3,5,-1,0", "4,5,3,1", "5,-1,120,0", "6,5,x,0", "7,5,9,-1", "8,9,2,0"]
    path.write_text("RecordID,Length_of_stay,Survival,In-hospital_death\n" + "\n".join(rows) + "\n")
    labels = source.read_labels()
    assert labels is not None
    assert labels.is_soft
    third = 0.35 / math.e
    assert tabulate(labels)["label"].to_list() == pytest.approx([0.35, third, 0, 1, third, 0, None, 0.35])
    named = read_labels(path, LabelColumns(label="In-hospital_death"))
    assert not named.is_soft
    assert tabulate(named)["label"].to_list() == [0, 0, 0, 1, 0, 0, None, 0]


@pytest.mark.parametrize(("first", "reason"), [("", "no_variable"), ("00:01", "no_variable"), ("00:01,HR", None)])
def test_a_first_row_of_fewer_fields_is_a_row_like_others(tmp_path: Path, first: str, reason: str | None) -> None:
    kept, rejected, _ = read(write(tmp_path, r1=HEADER + f"{first}\n00:02,Temp,3\n"))
    assert kept.filter(pl.col("row") == 2).select("variable", "value").rows() == [("Temp", 3.0)]
    assert rejected["reason"].to_list() == ([] if reason is None else [reason])


def test_outcomes_are_found_in_the_folder_or_beside_it(tmp_path: Path, tabulate: Tabulate) -> None:
    source = write(tmp_path / "set-b", r1=HEADER)
    assert source.read_labels() is None
    header = "RecordID,SAPS-I,In-hospital_death\n"
    (tmp_path / "Outcomes-a.txt").write_text(header + "1,6,0\n")
    (tmp_path / "Outcomes-b.txt").write_text(header + "1,6,1\n2,-1,0\n3,4,-1\n")
    labels = source.read_labels()
    assert labels is not None
    assert Path(labels.origin).name == "Outcomes-b.txt"  # of several, that of set-b
    assert tabulate(labels).rows() == [("1", 1), ("2", 0), ("3", None)]
    (tmp_path / "set-b" / "Outcomes-c.txt").write_text(header + "1,6,0\n")
    labels = source.read_labels()
    assert labels is not None
    assert labels.origin.endswith("Outcomes-c.txt")
    other = write(tmp_path / "records", r1=HEADER)
    with pytest.raises(UserError, match=r"2 files Outcomes-\*\.txt.*--labels"):
        other.read_labels()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Hour,Parameter,Value\n", r"1\.txt: the first line is not Time,Parameter,Value"),
        (HEADER + "00:00,RecordID,2\n", r"1\.txt: row 1 has another RecordID; name the file like"),
        ("", r"1\.txt: the first line"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, r1=content))


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(HEADER.encode() + b"\xff\xfe")
    with pytest.raises(UserError, match=r"1\.txt: cannot be read"):
        read(PhysioNet2012(path=tmp_path))


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record files"):
        PhysioNet2012(path=tmp_path).pieces()


def test_set_a_row_by_row(set_a_dir: Path) -> None:
    """A hundred real records against the plainest parser there is."""
    names = sorted(path.name for path in set_a_dir.iterdir())[:100]
    expected: Counter[tuple[str, float, str, float]] = Counter()
    for name in names:
        for line in (set_a_dir / name).read_text().splitlines()[1:]:
            clock, variable, value = line.split(",")
            missing = variable in {"Gender", "Height", "Weight"} and float(value) == -1
            if variable != "RecordID" and not missing:
                hours, minutes = clock.split(":")
                expected[name.removesuffix(".txt"), int(hours) * 60 + int(minutes), variable, float(value)] += 1
    source = PhysioNet2012(path=set_a_dir)
    kept, _ = clean(next(source.read(source.pieces()[0])))
    first = kept.filter(pl.col("patient_id") + ".txt" <= names[-1])
    found = Counter(first.select("patient_id", "minute", "variable", pl.col("value").cast(pl.Float64).round(4)).rows())
    assert found == Counter({(*key[:3], round(key[3], 4)): count for key, count in expected.items()})
