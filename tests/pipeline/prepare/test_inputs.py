"""A data set is that of its input: whatever changes in the input, but where it lies, is noticed."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

import preprocess

CSV = "patient_id,minute,variable,value,label\n"
DAY = datetime.datetime(2020, 1, 1)


def write_patient_files(folder: Path) -> list[str]:
    for split in ("train", "valid", "test"):
        (folder / "in" / split).mkdir(parents=True)
    for number in range(6):
        frame = pl.DataFrame({"variable": ["HR"], "value": [float(number)], "minute": [0.0]})
        frame.write_parquet(folder / "in" / "train" / f"{number}.parquet")
    for name in ("oc", "other"):
        (folder / "in" / f"{name}.csv").write_text("ts_id,in_hospital_mortality\n1,1\n" + "2,0\n" * (name == "oc"))
    return ["in"]


def write_table(folder: Path) -> list[str]:
    """Either file can be the events or the labels."""
    (folder / "in" / "deep").mkdir(parents=True)
    for name, value in (("a", 1), ("b", 2)):
        rows = "".join(f"p{number},0,HR,{number * value},{number % 2}\n" for number in range(9)) + "p0,never,HR,1,0\n"
        (folder / "in" / f"{name}.csv").write_text(CSV + rows)
    return ["in", "--split_fractions", "1,0,0"]


def write_meds(folder: Path) -> list[str]:
    for name in ("data/train", "data/held_out", "metadata", "task"):
        (folder / "in" / name).mkdir(parents=True)
    for number in range(2):
        times = pl.Series("time", [DAY, None], dtype=pl.Datetime("us"))
        pl.DataFrame({"subject_id": [number] * 2, "time": times, "code": ["A", "DEATH"]}).write_parquet(
            folder / "in" / "data" / "train" / f"{number}.parquet"
        )
    splits = pl.DataFrame({"subject_id": [0, 1], "split": ["train", "held_out"]})
    splits.write_parquet(folder / "in" / "metadata" / "subject_splits.parquet")
    labels = {"subject_id": [0], "prediction_time": [DAY], "boolean_value": [True]}
    pl.DataFrame(labels).write_parquet(folder / "in" / "task" / "0.parquet")
    return ["in", "--split_fractions", "1,0,0", "--labels", "in/task"]


def write_physionet(folder: Path) -> list[str]:
    (folder / "in").mkdir()
    for number in range(4):
        rows = f"Time,Parameter,Value\n00:00,RecordID,{number}\n00:01,HR,7{number}\n"
        (folder / "in" / f"{number}.txt").write_text(rows)
    (folder / "in" / "Outcomes-a.txt").write_text("RecordID,In-hospital_death\n0,1\n1,0\n")
    return ["in", "--split_fractions", "1,0,0"]


def move(old: str, new: str) -> Callable[[list[str]], list[str]]:
    def change(words: list[str]) -> list[str]:
        Path("in", old).rename(Path("in", new))
        return words

    return change


def exchange(first: str, second: str) -> Callable[[list[str]], list[str]]:
    def change(words: list[str]) -> list[str]:
        for old, new in ((first, "x"), (second, first), ("x", second)):
            Path("in", old).rename(Path("in", new))
        return words

    return change


def name(**flags: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [*words, *(word for flag, value in flags.items() for word in (f"--{flag}", value))]


def rename_task(words: list[str]) -> list[str]:
    Path("in/task").rename("in/death")
    return [*words[:-1], "in/death"]


@pytest.mark.parametrize(
    ("write", "before", "change"),
    [
        (write_patient_files, {}, move("train/0.parquet", "test/0.parquet")),
        (write_patient_files, {}, move("train/0.parquet", "train/7.parquet")),
        (write_patient_files, {}, exchange("train/0.parquet", "train/1.parquet")),
        (write_patient_files, {}, exchange("oc.csv", "other.csv")),
        (write_patient_files, {}, move("oc.csv", "away.csv")),
        (write_table, {}, move("b.csv", "deep/b.csv")),
        (write_table, {}, exchange("a.csv", "b.csv")),
        (write_table, {"labels": "in/a.csv"}, name(labels="in/b.csv")),
        (write_table, {"labels": "in/a.csv"}, move("b.csv", "deep/b.csv")),
        (write_meds, {}, move("data/train/0.parquet", "data/held_out/0.parquet")),
        (write_meds, {}, move("metadata/subject_splits.parquet", "metadata/splits.parquet")),
        (write_meds, {}, rename_task),
        (write_physionet, {}, move("Outcomes-a.txt", "Outcomes-b.txt")),
        (write_physionet, {}, move("Outcomes-a.txt", "a.txt")),
    ],
)
def test_files_that_are_moved_or_exchanged_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], list[str]], before: dict[str, str], change: Callable[[list[str]], list[str]],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = write(tmp_path)
    options = ["--workers", "1", "--output", "out"]
    assert preprocess.main([*name(**before)(words), *options]) == 0
    assert preprocess.main([*name(**before)(words), *options]) == 0
    assert "nothing to do" in capsys.readouterr().err
    manifest = Path("out/manifest.json").read_bytes()
    changed = change(name(**before)(words))
    assert preprocess.main([*changed, *options]) == 2
    assert "holds a data set of other input or options" in capsys.readouterr().err
    assert preprocess.main([*changed, *options, "--overwrite"]) == 0
    assert Path("out/manifest.json").read_bytes() != manifest


@pytest.mark.parametrize("write", [write_patient_files, write_table, write_meds, write_physionet])
def test_where_the_whole_input_lies_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = write(tmp_path)
    options = ["--workers", "1", "--output", "out"]
    assert preprocess.main([*words, *options]) == 0
    Path("elsewhere").mkdir()
    Path("in").rename("elsewhere/in")
    moved = [word.replace("in", "elsewhere/in", 1) if word.split("/")[0] == "in" else word for word in words]
    assert preprocess.main([*moved, *options]) == 0


def prepare_with_splits(folder: Path, splits: str, *flags: str) -> int:
    rows = "".join(f"{patient},{minute},HR,1\n" for patient in ("1", "2", "3", "4") for minute in (0, 5))
    (folder / "events.csv").write_text("patient_id,minute,variable,value\n" + rows)
    (folder / "splits.csv").write_text(splits)
    command = [str(folder / "events.csv"), "--output", str(folder / "out"), "--workers", "1", *flags]
    return preprocess.main([*command, "--splits", str(folder / "splits.csv")])


def test_a_file_may_say_which_patient_is_in_which_split(tmp_path: Path) -> None:
    """Who is not in it goes where the hash says; blanks and integers that come as floats are no matter."""
    assert prepare_with_splits(tmp_path, "subject_id,split\n1.0,test\n 2 , train \n3,valid\n9,test\n") == 0
    index = pl.read_parquet(tmp_path / "out" / "index.parquet")
    found = dict(index.select("patient_id", "split").iter_rows())
    assert {name: found[name] for name in ("1", "2", "3")} == {"1": "test", "2": "train", "3": "valid"}
    assert found["4"] in ("train", "valid", "test")
    before = json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprint"]
    shutil.rmtree(tmp_path / "out")
    assert prepare_with_splits(tmp_path, "subject_id,split\n1,test\n2,train\n3,test\n9,test\n") == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprint"] != before


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("patient_id,split\n1,train\n2,dev\n", "splits.csv: row 2 has no patient, or no split among train"),
        ("patient_id,split\n1,train\n,test\n", "splits.csv: row 2 has no patient"),
        ("patient_id,split\n1,train\n1,test\n", "splits.csv: patient number"),
        ("patient_id,fold\n1,train\n", "splits.csv: no column 'split'"),
        ("who,split\n1,train\n", "splits.csv: no column"),
    ],
)
def test_splits_that_cannot_be_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], splits: str, message: str
) -> None:
    assert prepare_with_splits(tmp_path, splits) == 2
    assert message in capsys.readouterr().err
