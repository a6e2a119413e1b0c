"""Tables as people really have them, small: each kind was found in a public report or in a real file."""

from __future__ import annotations

import bz2
import gzip
import html
import json
import os
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import preprocess
from pipeline import tasks
from pipeline.prepare.rules import read_ranges
from tests.prepared import read_prepared

HEADER = "patient_id,minute,variable,value\n"
START = datetime(2150, 1, 1)

Stays = dict[str, list[tuple[float | None, list[tuple[str, float | None]]]]]


def prepare(path: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Prepare an input, all of it for train; return the summary."""
    arguments = [str(path), "--output", str(output), "--workers", "1", "--split_fractions", "1,0,0"]
    assert preprocess.main([*arguments, *flags]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def read_stays(output: Path) -> Stays:
    """Return the sets of each patient, with names of variables and raw values."""
    prepared = read_prepared(output)
    names, scale = [row[0] for row in prepared.vocabulary], [row[2:] for row in prepared.vocabulary]
    return {
        patient: [
            (
                minute,
                [
                    (names[code], None if value is None else round(value * scale[code][1] + scale[code][0], 3))
                    for code, value in events
                ],
            )
            for minute, events in sets
        ]
        for patient, _, sets in prepared.patients["train"]
    }


def refuse(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> str:
    """Return the line with which an input is refused."""
    assert preprocess.main([str(path), "--output", str(path.parent / "refused"), "--workers", "1", *flags]) == 2
    assert not (path.parent / "refused").exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("piece_bytes", [1, 1 << 26])
def test_a_variable_has_one_name_whatever_type_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.reading.PIECE_BYTES", piece_bytes)
    (tmp_path / "in").mkdir()
    columns: list[pa.Array] = [
        pa.array([220045]),
        pa.array([220045.0]),
        pa.array(["220045 "]),
        pa.array([Decimal("220045.00")]),
        pa.array([220045], pa.uint64()),
        pa.array([b"220045"]),
        pa.array(["220045"]).dictionary_encode(),
        pa.array([220045]).dictionary_encode(),
        pa.array(["220045.0"], pa.large_string()),
    ]
    for number, column in enumerate(columns):
        table = pa.table({"patient_id": ["p"], "minute": [float(number)], "itemid": column, "valuenum": [1.0]})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    (tmp_path / "in" / "9.csv").write_text("patient_id,minute,itemid,valuenum\np,9,220045.00,1\n")
    prepare(tmp_path / "in", tmp_path / "out")
    assert [row[:2] for row in read_prepared(tmp_path / "out").vocabulary[2:]] == [("220045", 10)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_form_of_a_time_is_understood_by_itself(tmp_path: Path, order: tuple[int, int]) -> None:
    lines = ["p,2150-01-01 00:00:00,a,1\n", "p,2150-01-01T00:00:00Z,b,1\n"]
    others = "".join(
        f"p,{time},{name},1\n"
        for time, name in [
            ("2150-01-01 00:00:00 UTC", "c"), ("2150-01-01T02:00:00+02:00", "d"), ("2149-12-31T19:00:00.000-0500", "e"),
            ("2150-01-01", "f"), (" 2150-01-01 00:00", "g"), ("2150/01/01 00:00:00", "h"), ("9999-12-31 23:59:59", "i"),
            ("01/02/2150", "j"), ("", "k"),
        ]
    )  # fmt: skip
    text = "patient_id,charttime,variable,value\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.csv").write_text(text + "".join(lines[number] for number in order) + others)
    for name, number in zip(("site1.csv", "site2.csv"), order, strict=True):
        (tmp_path / "in" / name).write_text(text + lines[number].replace("p,", "q,"))
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert summary["rejects"] == {"bad_minute": 2, "end_of_time": 1}
    stays = read_stays(tmp_path / "out")
    assert stays["p"] == [(0.0, [(name, 1.0) for name in "abcdefgh"])]
    assert stays["q"] == [(0.0, [("a", 1.0), ("b", 1.0)])]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([START], pa.timestamp("s")),
        pa.array([START], pa.timestamp("ns")),
        pa.array([START], pa.timestamp("us", "UTC")),
        pa.array([START - timedelta(hours=1)], pa.timestamp("ms", "UTC")).cast(pa.timestamp("ms", "Europe/Paris")),
        pa.array([date(2150, 1, 1)], pa.date32()),
        pa.array([date(2150, 1, 1)], pa.date64()),
        pa.array(["2150-01-01T00:00:00Z"]),
    ],
    ids=lambda column: str(column.type),
)
def test_times_of_every_type_and_zone(tmp_path: Path, column: pa.Array) -> None:
    columns = {"patient_id": ["p"], "variable": ["a"], "value": [1.0]}
    pq.write_table(pa.table({**columns, "time": column}), tmp_path / "1.parquet", use_deprecated_int96_timestamps=False)
    at = START - timedelta(hours=1) if "Paris" in str(column.type) else START
    pq.write_table(
        pa.table({**columns, "time": pa.array([at + timedelta(minutes=5), datetime(9999, 12, 31)], pa.timestamp("us"))
                  .slice(0, 1)}),
        tmp_path / "2.parquet",
    )  # fmt: skip
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("1.parquet", "2.parquet"):
        (tmp_path / name).rename(folder / name)
    prepare(folder, tmp_path / "out")
    assert [minute for minute, _ in read_stays(tmp_path / "out")["p"]] == [0.0, 5.0]


def test_legacy_instants_of_96_bits_do_not_overflow(tmp_path: Path) -> None:
    table = pa.table(
        {
            "patient_id": ["p", "p", "p"],
            "time": pa.array(
                [datetime(2150, 1, 1), datetime(2150, 1, 1, 1), datetime(9999, 12, 31)], pa.timestamp("us")
            ),
            "variable": ["a", "a", "a"],
            "value": [1.0, 2.0, 3.0],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    assert prepare(tmp_path / "a.parquet", tmp_path / "out")["rejects"] == {"end_of_time": 1}
    assert [minute for minute, _ in read_stays(tmp_path / "out")["p"]] == [0.0, 60.0]


def test_linked_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.csv").write_text(HEADER + "p,1,a,1\n")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.csv").write_text(HEADER + "p,0,a,1\n")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert (summary["events_in"], summary["rejects"]) == (2, {})


def write_meds(folder: Path, name: str = "data/train/0.parquet", **columns: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "subject_id": pa.array([1, 1], pa.int64()),
        "time": pa.array([START, START + timedelta(minutes=7)], pa.timestamp("us")),
        "code": ["HR", "MEDS_DEATH"],
        "numeric_value": pa.array([80.0, None], pa.float32()),
    }
    made = {key: value for key, value in (table | columns).items() if value is not None}
    pq.write_table(pa.table(made), path)
    return folder


def test_a_linked_folder_of_meds_is_followed(tmp_path: Path) -> None:
    write_meds(tmp_path / "elsewhere", "0.parquet")
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "data" / "train").symlink_to(tmp_path / "elsewhere")
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert (summary["format"], summary["events_written"]) == ("meds", 2)


def test_a_link_to_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(HEADER + "p,0,a,1\n")
    (tmp_path / "in" / "train").symlink_to(tmp_path / "gone")
    assert "train: a link to nothing" in refuse(capsys, tmp_path / "in")


def test_names_of_files_and_columns_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "A.TSV").write_text("ICUSTAY_ID\tCHARTTIME\tITEMID\tVALUENUM\n1\t2150-1-1 0:00\tx\t2\n")
    pl.DataFrame(
        {"stay_id": [1], "charttime": ["2150-01-01T00:01:00Z"], "itemid": ["x"], "valuenum": [3]}
    ).write_parquet(tmp_path / "in" / "B.PARQUET")
    prepare(tmp_path / "in", tmp_path / "out")
    assert read_stays(tmp_path / "out") == {"1": [(0.0, [("x", 2.0)]), (1.0, [("x", 3.0)])]}


def test_files_and_folders_that_are_no_data_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.csv", ".ipynb_checkpoints/a-checkpoint.csv", "._a.csv", "_tmp/b.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(HEADER + f"p,{len(name)},a,1\n")
    summary = prepare(folder, tmp_path / "out")
    assert (summary["events_in"], summary["files_left_out"]) == (1, 3)
    (folder / "explicit").mkdir()
    assert prepare(folder / "._a.csv", tmp_path / "named")["events_in"] == 1


def test_meds_without_its_number_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_meds(tmp_path / "in", numeric_value=None, value=pa.array([80.0, None]))
    prepare(folder, tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert "no column 'numeric_value'" in said
    assert "--value_column value" in said
    assert read_stays(tmp_path / "out") == {"1": [(0.0, [("HR", None)]), (7.0, [("MEDS_DEATH", None)])]}
    prepare(folder, tmp_path / "named", "--value_column", "value")
    assert read_stays(tmp_path / "named") == {"1": [(0.0, [("HR", 80.0)]), (7.0, [("MEDS_DEATH", None)])]}


def test_of_value_and_valuenum_the_number_is_taken(tmp_path: Path) -> None:
    (tmp_path / "chartevents.csv").write_text(
        "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning\n"
        "1,2,3,4,2150-01-01 00:00:00,2150-01-01 00:05:00,220739,Spontaneously,4,,0\n"
        "1,2,3,4,2150-01-01 00:01:00,2150-01-01 00:05:00,220645,<1.4,1.4,mEq/L,0\n"
        "1,2,3,4,2150-01-01 00:02:00,2150-01-01 00:05:00,220645,___,15.1,mEq/L,0\n"
    )
    assert prepare(tmp_path / "chartevents.csv", tmp_path / "out")["rejects"] == {}
    assert read_stays(tmp_path / "out") == {
        "3": [(0.0, [("220739", 4.0)]), (1.0, [("220645", 1.4)]), (2.0, [("220645", 15.1)])]
    }


@pytest.mark.parametrize("part", ["data", "data/train", "data/train/0.parquet"])
def test_a_part_of_a_meds_data_set_names_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    folder = write_meds(tmp_path / "in")
    (folder / "metadata").mkdir()
    line = refuse(capsys, folder / part)
    assert f"is part of the MEDS data set {folder}; name that folder" in line


def test_meds_is_seen_by_its_columns(tmp_path: Path) -> None:
    flat = write_meds(tmp_path / "flat", "0.parquet")
    assert prepare(flat, tmp_path / "flat_out")["format"] == "meds"
    beside = write_meds(tmp_path / "beside")
    (beside / "a.csv").write_text(HEADER + "p,0,a,1\n")
    assert prepare(beside / "a.csv", tmp_path / "beside_out")["format"] == "table"
    for split in ("train", "tuning", "held_out"):
        write_meds(tmp_path / "folders", f"{split}/0.parquet")
    assert prepare(tmp_path / "folders", tmp_path / "out")["format"] == "meds"
    old = write_meds(tmp_path / "old", subject_id=None, patient_id=pa.array([1, 1]))
    summary = prepare(old, tmp_path / "old_out")
    assert (summary["format"], summary["rejects"]) == ("meds", {})


def test_types_that_a_column_may_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_meds(tmp_path / "in", code=[b"HR", b"MEDS_DEATH"])
    write_meds(folder, "data/train/1.parquet", **{name: pa.array([], pa.null()) for name in
               ("subject_id", "time", "code", "numeric_value")})  # fmt: skip
    (folder / "metadata").mkdir()
    codes = {"code": ["HR"], "description": pa.array([["Heart rate", "per minute"]], pa.list_(pa.string()))}
    pq.write_table(pa.table(codes), folder / "metadata" / "codes.parquet")
    prepare(folder, tmp_path / "out")
    vocabulary = pq.read_table(tmp_path / "out" / "vocabulary.parquet")
    assert vocabulary["variable"].to_pylist()[2:] == ["HR", "MEDS_DEATH"]
    assert vocabulary["description"].to_pylist()[2:] == ["Heart rate; per minute", None]
    large = write_meds(tmp_path / "large", subject_id=pa.array([2**63 + 77, 1], pa.uint64()))
    line = refuse(capsys, large)
    assert "row 1 has a subject_id that is no int64" in line
    assert str(2**63 + 77) not in line
    table = {"patient_id": pa.array([2**63 + 77], pa.uint64()), "minute": [0.0], "variable": ["a"], "value": [1.0]}
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    prepare(tmp_path / "table.parquet", tmp_path / "table")
    assert list(read_stays(tmp_path / "table")) == [str(2**63 + 77)]


def test_missing_is_missing_in_every_type(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    words = ["", " ", "NULL", r"\N", "nan", "NA", "None", "<NA>"]
    rows = [f"{word},0,a,1\n" for word in words] + [f"p,{number},b,{word}\n" for number, word in enumerate(words)]
    (tmp_path / "in" / "a.csv").write_text(HEADER + "".join(rows) + "p,0,NULL,1\np,0,Na,140\n")
    table = {"patient_id": [float("nan"), None], "minute": [0.0, 0.0], "variable": ["a", "a"], "value": [1.0, 1.0]}
    pq.write_table(pa.table(table), tmp_path / "in" / "b.parquet")
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert summary["rejects"] == {"no_patient": len(words) + 2, "no_variable": 1}
    assert read_stays(tmp_path / "out")["p"][0] == (0.0, [("Na", 140.0), ("b", None)])


def test_ids_that_are_decimals_are_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ids = pa.array([Decimal("200001.00")], pa.decimal128(38, 2))
    table = pa.table({"patient_id": ids, "minute": [0.0], "variable": ["a"], "value": [1.0]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "b.csv").write_text(HEADER + "200001.00,1,a,2\n 200001 ,2,a,3\n")
    prepare(tmp_path / "in", tmp_path / "out")
    assert [len(sets) for sets in read_stays(tmp_path / "out").values()] == [3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "patient_id,time,variable,value\np,01/02/2150 05:00,a,1\n",
            "bad_minute 1 (column 'time', as in '##/##/#### ##:##')",
        ),
        ("patient_id,time,variable,value\np,7.5,a,1\n", "bad_minute 1 (column 'time', as in '#.#')"),
        (HEADER + "p,0,a,12;5\n", "bad_value 1 (column 'value', as in '##;#')"),
        (HEADER + ",0,a,12\n", "no_patient 1"),
    ],
)  # fmt: skip
def test_where_no_row_can_be_used_reasons_and_forms_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "a.csv").write_text(text)
    line = refuse(capsys, tmp_path / "a.csv")
    assert "no row can be used" in line
    assert expected in line


def test_times_in_hours_are_read_where_the_unit_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("patient_id,time,variable,value\np,7.5,a,1\n")
    prepare(tmp_path / "a.csv", tmp_path / "out", "--time_unit", "hours")
    assert read_stays(tmp_path / "out") == {"p": [(450.0, [("a", 1.0)])]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEADER + '"SECRET-ID-77,0,hr,80\n', "row 1 opens a quote"),
        (HEADER + "p,0,hr,80\nSECRET-ID-77,0,hr,80,5\n", "row 2 has 5 fields, the header 4"),
        (HEADER + "SECRET-ID-77,0,h\xe4,80\n", "row 1 is not in the encoding utf-8; say which"),
    ],
)
def test_errors_quote_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    line = refuse(capsys, tmp_path / "a.csv")
    assert expected.split(";", maxsplit=1)[0] in line
    assert "--encoding" in line
    assert "SECRET" not in line


def test_separators_and_encodings_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "patient_id;minute;variable;value\np;0,5;Größe;12,5\n"
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    assert "--separator" in refuse(capsys, tmp_path / "a.csv", "--encoding", "latin-1")
    flags = ["--separator", ";", "--decimal_comma", "--encoding", "latin-1"]
    prepare(tmp_path / "a.csv", tmp_path / "out", *flags)
    assert read_stays(tmp_path / "out") == {"p": [(0.5, [("Größe", 12.5)])]}


def test_several_sets_of_physionet_2012_are_read_together(tmp_path: Path) -> None:
    for name, patient in (("a", 132539), ("b", 142675)):
        folder = tmp_path / "in" / f"set-{name}"
        folder.mkdir(parents=True)
        rows = f"Time,Parameter,Value\n00:00,RecordID,{patient}\n00:07,HR,73\n"
        (folder / f"{patient}.txt").write_text(rows)
        outcome = f"RecordID,In-hospital_death\n{patient},{int(name == 'b')}\n"
        (tmp_path / "in" / f"Outcomes-{name}.txt").write_text(outcome)
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert (summary["format"], summary["patients"]) == ("physionet2012", 2)
    assert {patient: label for patient, label, _ in read_prepared(tmp_path / "out").patients["train"]} == {
        "132539": 0, "142675": 1,
    }  # fmt: skip


def test_wide_tables(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    hours = [timedelta(hours=hour) for hour in (0, 1, 2)]
    dynamic = {"stay_id": [1, 1, 2], "time": hours, "hr": [80.0, None, None], "gcs": ["alert", None, ""]}
    pl.DataFrame(dynamic).write_parquet(tmp_path / "in" / "vitals.parquet")
    other = {"stay_id": [2, 1], "time": hours[:2], "sbp": [120, 110]}
    pl.DataFrame(other).write_parquet(tmp_path / "in" / "pressure.parquet")
    (tmp_path / "in" / "static.csv").write_text("stay_id,age,sex\n1,60,Male\n2,,Female\n")
    summary = prepare(tmp_path / "in", tmp_path / "out", "--static_tables", "static.csv")
    assert (summary["events_in"], summary["source_rows"], summary["rejects"]) == (7, 7, {})
    assert read_stays(tmp_path / "out") == {
        "1": [(None, [("age", 60.0), ("sex=Male", None)]), (0.0, [("gcs=alert", None), ("hr", 80.0)]),
              (60.0, [("sbp", 110.0)])],
        "2": [(None, [("sex=Female", None)]), (0.0, [("sbp", 120.0)])],
    }  # fmt: skip
    (tmp_path / "categories.csv").write_text("variable,category,value\nsex,Male,1\nsex,Female,0\n")
    flags = ["--static_tables", "static.csv", "--categories", str(tmp_path / "categories.csv")]
    prepare(tmp_path / "in", tmp_path / "numbers", *flags)
    assert read_stays(tmp_path / "numbers")["2"][0] == (None, [("sex", 0.0)])


def test_a_label_in_a_wide_table_is_no_variable(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("patient_id,minute,hr,label,died\np,0,80,1,1\n")
    prepare(tmp_path / "a.csv", tmp_path / "out", "--ignore_columns", "died")
    assert read_stays(tmp_path / "out") == {"p": [(0.0, [("hr", 80.0)])]}


def test_physionet_2019(tmp_path: Path) -> None:
    header = "HR|Temp|Age|Gender|Unit1|Unit2|HospAdmTime|ICULOS|SepsisLabel\n"
    for name, rows in {
        "training_setA/p000001.psv": "80|NaN|60|1|NaN|NaN|-3.5|1|0\n81|36.5|60|1|NaN|NaN|-3.5|2|1\n",
        "training_setB/p100001.psv": "NaN|NaN|50|0|NaN|NaN|-1|1|0\n",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text(header + rows)
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert (summary["format"], summary["source_rows"], summary["events_in"]) == ("physionet2019", 3, 9)
    assert summary["labels_from"] == "in: SepsisLabel"
    table = pq.read_table(tmp_path / "out" / "tasks" / "default.parquet").to_pylist()
    names = ("patient_id", "prediction_minute", "num_events", "label")
    assert [tuple(row[name] for name in names) for row in table] == [
        ("p100001", 60.0, 3, 0), ("p000001", 60.0, 4, 0), ("p000001", 120.0, 6, 1),
    ]  # fmt: skip
    assert read_stays(tmp_path / "out") == {
        "p000001": [(None, [("Age", 60.0), ("Gender", 1.0), ("HospAdmTime", -3.5)]), (60.0, [("HR", 80.0)]),
                    (120.0, [("HR", 81.0), ("Temp", 36.5)])],
        "p100001": [(None, [("Age", 50.0), ("Gender", 0.0), ("HospAdmTime", -1.0)])],
    }  # fmt: skip


def test_yaib(tmp_path: Path) -> None:
    hours = [timedelta(hours=hour) for hour in (0, 1, 0)]
    folder = tmp_path / "in"
    folder.mkdir()
    dynamic = {"stay_id": [1, 1, 2], "time": hours, "hr": [80.0, None, None], "na": [None, 140.0, None]}
    pl.DataFrame(dynamic, schema_overrides={"time": pl.Duration("ms")}).write_parquet(folder / "dyn.parquet")
    static = {"stay_id": [1, 2], "age": [60, None], "sex": ["Male", "Female"]}
    pl.DataFrame(static).write_parquet(folder / "sta.parquet")
    pl.DataFrame({"stay_id": [1, 2], "label": [0, 1]}).write_parquet(folder / "outc.parquet")
    summary = prepare(folder, tmp_path / "out")
    assert (summary["format"], summary["events_in"], summary["rejects"]) == ("yaib", 5, {})
    assert (summary["labels_from"], summary["samples"]["train"]["class_counts"][1]) == ("outc.parquet", 1)
    assert read_stays(tmp_path / "out") == {
        "1": [(None, [("age", 60.0), ("sex=Male", None)]), (0.0, [("hr", 80.0)]), (60.0, [("na", 140.0)])],
        "2": [(None, [("sex=Female", None)])],
    }


def test_carried_forward_rows_are_no_events(tmp_path: Path) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    columns = {"variable": ["a", "a"], "value": [1.0, 1.0], "time": [0.0, 5.0], "is_carry": [False, True]}
    columns |= {"age": [60, 60], "v0": [0.1, 0.2], "v1": [0.1, 0.2]}
    pl.DataFrame(columns).write_parquet(tmp_path / "in" / "train" / "1.0.parquet")
    assert prepare(tmp_path / "in", tmp_path / "out")["rejects"] == {"carried_forward": 1}
    assert read_stays(tmp_path / "out") == {"1": [(0.0, [("a", 1.0)])]}


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
        return packed
    return {".gz": gzip.compress, ".bz2": bz2.compress}[suffix](content)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_packed_files_are_read_in_parts_as_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    rows = "".join(f"{number % 7},{number},a,{number}\n" for number in range(500))
    (tmp_path / "a.csv").write_text(HEADER + rows)
    (tmp_path / f"b.csv{suffix}").write_bytes(pack((HEADER + rows).encode(), suffix))
    prepare(tmp_path / "a.csv", tmp_path / "plain")
    for name in ("csv_files.PIECE_BYTES", "csv_files.BLOCK_BYTES"):
        monkeypatch.setattr(f"pipeline.prepare.sources.{name}", 300)
    for name in ("sources.table.CHUNK_ROWS", "spill.SPILL_ROWS"):
        monkeypatch.setattr(f"pipeline.prepare.{name}", 20)
    summary = prepare(tmp_path / f"b.csv{suffix}", tmp_path / "packed")
    assert summary["events_in"] == 500
    for name in ("train/00000.parquet", "index.parquet", "vocabulary.parquet"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_a_packed_file_that_is_cut_off_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    rows = "".join(f"{number},{number},a,{number}\n" for number in range(5000))
    packed = pack((HEADER + rows).encode(), suffix)
    (tmp_path / f"a.csv{suffix}").write_bytes(packed[: len(packed) // 2])
    assert f"a.csv{suffix}: cannot be read" in refuse(capsys, tmp_path / f"a.csv{suffix}")


def test_minutes_count_from_a_table_of_origins(tmp_path: Path) -> None:
    (tmp_path / "icustays.csv.gz").write_bytes(
        gzip.compress(b"subject_id,stay_id,intime,outtime\n7,3,2150-01-01 00:00:00,2150-01-02 00:00:00\n")
    )
    (tmp_path / "chartevents.csv.gz").write_bytes(
        gzip.compress(
            b"stay_id,charttime,itemid,valuenum\n3.0,2150-01-01 01:00:00,220045,80\n"
            b"3.0,2149-12-31 23:00:00,220045,81\n4,2150-01-01 01:00:00,220045,80\n"
        )
    )
    flags = ["--origin_table", f"{tmp_path / 'icustays.csv.gz'}:stay_id:intime"]
    summary = prepare(tmp_path / "chartevents.csv.gz", tmp_path / "out", *flags)
    assert summary["rejects"] == {"no_origin": 1}
    assert read_stays(tmp_path / "out") == {"3": [(-60.0, [("220045", 81.0)]), (60.0, [("220045", 80.0)])]}


def test_a_file_of_another_form_is_refused_beside_a_good_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(HEADER + "p,0,a,1\n")
    (tmp_path / "in" / "b.csv").write_text("patient_id,charttime,variable,value\np,2150-01-01 00:00:00,a,1\n")
    assert "give minutes in all files or dates in all" in refuse(capsys, tmp_path / "in")
    assert os.listdir(tmp_path) == ["in"]


def test_one_outlier_that_flattens_a_variable_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = 2000
    values = [80.0 + minute % 30 for minute in range(number)]
    rows = {"patient_id": ["p"] * number, "minute": range(number), "variable": ["hr"] * number, "value": values}
    frame = pl.DataFrame(rows | {"value": [*values[:-1], 10_000_000.0]})
    frame = pl.concat([frame, frame.head(2).with_columns(variable=pl.lit("flat"), value=pl.lit(1.0))])
    frame.write_parquet(tmp_path / "a.parquet")
    summary = prepare(tmp_path / "a.parquet", tmp_path / "out")
    outlier, constant = summary["warnings"]
    assert "variable 'hr': a single value makes up 100% of the variance" in outlier
    assert "--ranges or --outlier_std" in outlier
    assert constant == "always the same value: 'flat'"
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: {outlier}" in said
    assert outlier in html.unescape((tmp_path / "out" / "report.html").read_text())
    assert prepare(tmp_path / "a.parquet", tmp_path / "mended", "--outlier_std", "9")["warnings"] == [constant]


def test_labels_that_name_nobody_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(HEADER + "00123,0,hr,80\n4,0,hr,81\n")
    (tmp_path / "labels.csv").write_text("patient_id,label\n123,1\n4,0\n5,1\n")
    summary = prepare(tmp_path / "a.csv", tmp_path / "out", "--labels", str(tmp_path / "labels.csv"))
    expected = (
        "2 labels name no patient of the data set, and are left out; "
        "1 of their ids differ from one of the data set in leading zeros or case alone"
    )
    assert expected in summary["warnings"]
    assert capsys.readouterr().err.count("name no patient") == 1
    add = ["add", str(tmp_path / "out"), "--name", "again", "--labels", str(tmp_path / "labels.csv")]
    assert tasks.main(add) == 0
    assert f"warning: {expected}\n" in capsys.readouterr().err


def test_labels_that_are_words_for_missing_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text(HEADER + "".join(f"{patient},1,hr,{patient}\n" for patient in range(60)))
    labels = "".join(f"{patient},{'NA' if patient % 3 == 0 else patient % 2}\n" for patient in range(60))
    (tmp_path / "labels.csv").write_text("patient_id,label\n" + labels)
    summary = prepare(tmp_path / "in.csv", tmp_path / "out", "--labels", str(tmp_path / "labels.csv"))
    assert sum(split["num_labelled"] for split in summary["samples"].values()) == 40
    (warning,) = (text for text in summary["warnings"] if "words that mean missing" in text)
    assert "'na' 20; where one is a class, name all classes with --label_classes" in warning
    assert capsys.readouterr().err.count(f"warning: {warning}\n") == 1
    assert tasks.main(["add", str(tmp_path / "out"), "--name", "a", "--labels", str(tmp_path / "labels.csv")]) == 0
    assert f"warning: {warning}\n" in capsys.readouterr().err


def test_files_of_other_units_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for site, factor in (("a", 1.0), ("b", 18.0), ("c", 1.0)):
        rows = [
            f"{site}{at % 25},{at},glucose,{factor * (5 + at % 3)}\n{site}{at % 25},{at},hr,{80 + at % 9}"
            for at in range(150)
        ]
        (tmp_path / "in" / f"{site}.csv").write_text(HEADER + "\n".join(rows) + "\n")
    summary = prepare(tmp_path / "in", tmp_path / "out")
    (warning,) = summary["warnings"]
    assert warning.startswith(
        "medians of files or sites a factor apart: 'glucose' (18 times as high in b.csv as in a.csv);"
    )
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert warning in html.unescape((tmp_path / "out" / "report.html").read_text())


def write_two_sites(folder: Path, patients: list[int], hospitals: list[str | None]) -> None:
    """MEDS with glucose in mmol/L, at hospital B in mg/dL; both share each file."""
    number = [(5 + at % 3) * (18 if site == "B" else 1) for at, site in enumerate(hospitals)]
    write_meds(folder, subject_id=pa.array(patients), hospital=hospitals, ward=["w"] * len(patients),
               time=pa.array([START + timedelta(minutes=at) for at in range(len(patients))], pa.timestamp("us")),
               code=["GLUCOSE"] * len(patients), numeric_value=pa.array(number, pa.float32()))  # fmt: skip


@pytest.mark.parametrize("declared", [["hospital"], ["hospital", "ward"], ["nowhere"], None])
def test_sites_that_meds_declares_are_compared_within_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], declared: list[str] | None
) -> None:
    patients = [at % 50 for at in range(400)]
    write_two_sites(tmp_path / "in", patients, ["AB"[patient >= 25] for patient in patients])
    (tmp_path / "in" / "metadata").mkdir()
    (tmp_path / "in" / "metadata" / "dataset.json").write_text(json.dumps({"site_id_columns": declared}))
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert summary["variables"] == 1  # a site is no event
    said = capsys.readouterr().err
    if declared in (None, ["nowhere"]):
        assert summary["warnings"] == []
        return
    assert f"sites are those of {', '.join(declared)}: medians are compared between them" in said
    more = "//w" if len(declared) == 2 else ""
    expected = f"'GLUCOSE' (18 times as high in site B{more} as in site A{more});"
    assert summary["warnings"][0].startswith(f"medians of files or sites a factor apart: {expected}")


def test_rows_without_a_site_count_with_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hospitals = ["B" if at % 50 >= 25 else None for at in range(400)]
    write_two_sites(tmp_path / "in", [at % 50 for at in range(400)], hospitals)
    summary = prepare(tmp_path / "in", tmp_path / "out", "--site_column", "hospital")
    assert "(18 times as high in site B as in data/train/0.parquet)" in summary["warnings"][0]
    assert "no column 'hospitals'" in refuse(capsys, tmp_path / "in", "--site_column", "hospitals")


@pytest.mark.parametrize("is_wide", [False, True])
def test_the_site_of_a_table_is_named(tmp_path: Path, is_wide: bool) -> None:
    (tmp_path / "in").mkdir()
    rows = [(f"p{at % 40}", at, "AB"[at % 40 >= 20], (5 + at % 3) * (18 if at % 40 >= 20 else 1)) for at in range(320)]
    header = "patient_id,minute,hospital,glucose" if is_wide else "patient_id,minute,hospital,variable,value"
    texts = [f"{p},{t},{site},{'' if is_wide else 'glucose,'}{value}" for p, t, site, value in rows]
    for name, part in (("a", texts[:160]), ("b", texts[160:])):  # alike, so that files say nothing
        (tmp_path / "in" / f"{name}.csv").write_text("\n".join([header, *part]) + "\n")
    (tmp_path / "in" / "static.csv").write_text("patient_id,age\n" + "".join(f"p{at},{at}\n" for at in range(40)))
    flags = ["--site_column", "hospital", "--static_tables", "static.csv"]
    summary = prepare(tmp_path / "in", tmp_path / "out", *flags)
    assert "'glucose' (18 times as high in site B as in site A)" in summary["warnings"][0]
    assert summary["variables"] == 2
    without = prepare(tmp_path / "in", tmp_path / "without", *flags[2:], "--ignore_columns", "hospital")
    assert without["warnings"] == []
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "key").chmod(0o600)
    hidden = prepare(tmp_path / "in", tmp_path / "hidden", *flags, "--pseudonymize", str(tmp_path / "key"))
    assert "site B" not in hidden["warnings"][0]


def test_what_was_recognised_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("stay_id,charttime,itemid,valuenum,storetime\n3,2150-01-01 00:00:00,1,1,x\n")
    summary = prepare(tmp_path / "a.csv", tmp_path / "out")
    expected = "a.csv: patient_id = stay_id, time = charttime, variable = itemid, value = valuenum; not used: storetime"
    assert any(expected in note for note in summary["notes"])
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "stay_id,charttime,itemid,valuenum\n3,2150-01-01 00:00:00,220045,80\n3,01/02/2150,220045,81\n"
    (tmp_path / "a.csv").write_text(text)
    flags = [str(tmp_path / "a.csv"), "--output", str(tmp_path / "out"), "--dry_run"]
    assert preprocess.main(flags) == 0
    said = capsys.readouterr().out
    assert "time = charttime" in said
    assert "sample: 2 rows of the beginnings of 1 of 1 files, 1 kept" in said
    assert "rejected: bad_minute 1 (column 'charttime', as in '##/##/####')" in said
    assert "1 variables, such as 220045" in said
    assert "the work: 1 pieces, about 2 rows" in said
    assert os.listdir(tmp_path) == ["a.csv"]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_a_dry_run_reads_the_beginning_of_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (tmp_path / "in").mkdir()
    for file in range(12):
        factor = 18.0 if file == 10 else 1.0  # another unit
        rows = [(f"{file}-{at % 20}", float(at), "glucose", factor * (5 + at % 3)) for at in range(9000)]
        frame = pl.DataFrame(rows, ["patient_id", "minute", "variable", "value"], orient="row")
        if file == 11:
            frame = frame.with_columns(minute=pl.lit("01/02/2150"))
        path = tmp_path / "in" / f"{file:02}{suffix}"
        if suffix == ".parquet":
            frame.write_parquet(path)
        else:
            text = frame.write_csv().encode()
            path.write_bytes(pack(text, ".gz") if suffix == ".csv.gz" else text)
    monkeypatch.setattr("pipeline.prepare.dry_run.SAMPLE_BYTES", 1)  # the least of a file: 64 KiB
    assert preprocess.main([str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    sampled, kept = (int(text.replace(",", "")) for text in re.findall(r"([\d,]+) (?:rows of|kept)", said))
    assert 12 * 1000 < sampled < 12 * 4500
    assert f"rejected: bad_minute {sampled - kept:,} (column 'minute', as in '##/##/####')" in said
    assert "'glucose' (18 times as high in 10" in said
    (total,) = (int(text.replace(",", "")) for text in re.findall(r"about ([\d,]+) rows", said))
    assert total == pytest.approx(12 * 9000, rel=0.1 if suffix != ".csv.gz" else 0.9)
    assert os.listdir(tmp_path) == ["in"]


def test_the_ranges_of_yaib_are_rules(tmp_path: Path) -> None:
    ranges = read_ranges(Path(preprocess.__file__).parent / "pipeline" / "prepare" / "ranges" / "yaib.csv")
    assert len(ranges) == 36
    assert ranges["temp"] == (32.0, 42.0, "reject")
    assert ranges["be"] == (-25.0, 25.0, "reject")


def test_splits_of_meds_may_be_a_folder(tmp_path: Path) -> None:
    folder = write_meds(tmp_path / "in", subject_id=pa.array([1, 2]), code=["HR", "HR"])
    (folder / "metadata" / "subject_splits").mkdir(parents=True)
    for subject, split in ((1, "train"), (2, "held_out")):
        table = pa.table({"subject_id": [subject], "split": [split]})
        pq.write_table(table, folder / "metadata" / "subject_splits" / f"{split}.parquet")
    prepare(folder, tmp_path / "out")
    patients = read_prepared(tmp_path / "out").patients
    assert {split: [row[0] for row in rows] for split, rows in patients.items()} == {
        "train": ["1"], "valid": [], "test": ["2"],
    }  # fmt: skip
