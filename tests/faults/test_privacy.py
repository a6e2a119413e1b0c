"""Ids can be replaced by keyed hashes, files are their owner's, and nothing of a patient is printed."""

from __future__ import annotations

import hmac
import json
import os
import stat
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

import preprocess
import train
from tests.prepared import read_prepared

KEY = bytes(range(32))
IDS = [f"secret-{number}" for number in range(20)]


def hidden(name: str) -> str:
    return hmac.new(KEY, name.encode(), "sha256").hexdigest()[:32]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    return path


def table(folder: Path) -> list[str]:
    folder.mkdir()
    rows = [f"{name},{minute},HR,{minute + len(name)}" for name in IDS for minute in range(3)]
    rows += [f"{IDS[0]},never,HR,1", "only-rejected,never,HR,1"]
    (folder / "in.csv").write_text("\n".join(["patient_id,minute,variable,value", *rows]) + "\n")
    labels = "".join(f"{name},{number % 2}\n" for number, name in enumerate(IDS))
    (folder / "labels.csv").write_text("patient_id,label\n" + labels + "secret-nobody,1\n")
    return [str(folder / "in.csv"), "--labels", str(folder / "labels.csv")]


def physionet(folder: Path) -> list[str]:
    folder.mkdir()
    for number in range(20):
        text = f"Time,Parameter,Value\n00:00,RecordID,99{number:04d}\n00:07,HR,{number}\nnever,HR,1\n"
        (folder / f"99{number:04d}.txt").write_text(text)
    return [str(folder)]


def meds(folder: Path) -> list[str]:
    (folder / "data").mkdir(parents=True)
    (folder / "metadata").mkdir()
    ids = [990_000 + number for number in range(20)]
    times = pl.Series([0, 60_000_000, None] * 20, dtype=pl.Datetime("us"))
    events = {"subject_id": [i for i in ids for _ in range(3)], "time": times, "code": ["A", "B", "MEDS_DEATH"] * 20}
    pl.DataFrame(events).write_parquet(folder / "data" / "0.parquet")
    splits = {"subject_id": ids, "split": ["train"] * 10 + ["tuning"] * 5 + ["held_out"] * 5}
    pl.DataFrame(splits).write_parquet(folder / "metadata" / "subject_splits.parquet")
    return [str(folder)]


def patient_files(folder: Path) -> list[str]:
    for number in range(20):
        path = folder / ("train", "valid", "test")[number % 3] / f"99{number:04d}.0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame({"minute": [0.0, None], "variable": ["HR", "HR"], "value": [1.0, 2.0]}).write_parquet(path)
    (folder / "oc.csv").write_text("ts_id,in_hospital_mortality\n990000.0,1\n990001,0\n")
    return [str(folder)]


@pytest.mark.parametrize("make", [table, physionet, meds, patient_files])
def test_no_id_is_in_any_output(
    make: object, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(make)
    given = make(tmp_path / "in")
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # work files stay, to be looked at
    flags = ["--workers", "1", "--shard_format", "both", "--verbose"]
    assert preprocess.main([*given, *flags, "--output", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert preprocess.main([*given, *flags, "--output", str(tmp_path / "out"), "--pseudonymize", str(key)]) == 0
    printed = capsys.readouterr()
    plain, out = read_prepared(tmp_path / "plain"), read_prepared(tmp_path / "out")
    assert plain.rejects == out.rejects
    mine = {patient[0]: patient[1:] for patients in out.patients.values() for patient in patients}
    theirs = {patient[0]: patient[1:] for patients in plain.patients.values() for patient in patients}
    assert mine.keys() == {hidden(name) for name in theirs}
    assert {name: mine[hidden(name)][0] for name in theirs} == {name: value[0] for name, value in theirs.items()}
    texts = [printed.out, printed.err.replace(str(tmp_path), "")]
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix == ".parquet":
            texts.append(json.dumps(pq.ParquetFile(path).read().to_pylist(), default=str))
        elif path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
    for name in theirs:
        assert not any(name in text for text in texts)
    assert not any("secret" in text or "only-rejected" in text for text in texts)


def test_new_patients_get_the_pseudonyms_of_the_same_key(
    tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, private = table(tmp_path / "in"), ["--pseudonymize", str(key)]
    assert preprocess.main([*given, "--workers", "1", "--output", str(tmp_path / "a"), *private]) == 0
    like = [*given, "--workers", "1", "--output", str(tmp_path / "b"), "--like", str(tmp_path / "a")]
    capsys.readouterr()
    assert preprocess.main(like) == 2
    assert "has pseudonyms for patients; give --pseudonymize too" in capsys.readouterr().err
    assert preprocess.main([*like, *private]) == 0
    ids = [set(pq.read_table(tmp_path / name / "index.parquet")["patient_id"].to_pylist()) for name in "ab"]
    assert ids[0] == ids[1] == {hidden(name) for name in IDS}


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [(31, 0o600, "31 bytes, 32 are needed"), (32, 0o644, "chmod 600"), (None, 0, "cannot be read")],
)
def test_a_key_that_protects_nothing_is_refused(
    size: int | None, mode: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    if size is not None:
        path.write_bytes(bytes(size))
        path.chmod(mode)
    given = [*table(tmp_path / "in"), "--output", str(tmp_path / "out"), "--pseudonymize", str(path)]
    assert preprocess.main(given) == 2
    assert f"--pseudonymize {path}: " in (said := capsys.readouterr().err)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_files_are_their_owner_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        data, run = tmp_path / "data", tmp_path / "run"
        assert preprocess.main([*table(tmp_path / "in"), "--workers", "2", "--output", str(data)]) == 0
        os.umask(0)
        flags = ["--max_epochs", "1", "--profile_memory"]
        assert train.main(["--data_dir", str(data), "--output_dir", str(run), *flags]) == 0
    finally:
        os.umask(before)
    for folder in (data, run):
        for path in (folder, *folder.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_errors_show_no_value_of_a_patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = table(tmp_path / "in")
    labels = tmp_path / "in" / "labels.csv"
    for text in ("secret-1,maybe-secret\n", "secret-1,1\nsecret-1,0\n"):
        labels.write_text("patient_id,label\n" + text)
        assert preprocess.main([*given, "--output", str(tmp_path / "out")]) == 2
        assert "secret" not in capsys.readouterr().err.replace(str(tmp_path), "")
    record = physionet(tmp_path / "records")
    (tmp_path / "records" / "1.txt").write_text("Time,Parameter,Value\n00:00,RecordID,770001\n")
    assert preprocess.main([*record, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "1.txt: row 1 has another RecordID" in said
    assert "770001" not in said
