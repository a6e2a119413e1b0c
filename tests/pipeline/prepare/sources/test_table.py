from __future__ import annotations

import datetime
import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.prepare.clean import clean
from pipeline.prepare.sources.table import Table
from pipeline.schema import UserError
from tests.pipeline.prepare.sources.conftest import Tabulate

CSV = "patient_id,minute,variable,value\na,0,HR,80\na,1.5,RR,\n,2,HR,1\n"
NOON = datetime.datetime(2020, 1, 1, 12)


def kept_rows(source: Table) -> list[tuple[Any, ...]]:
    """Kept rows of all files, in the order of the files' names."""
    rows = [
        (piece.files[row[0]], *row[1:])
        for piece in source.pieces()
        for raw in source.read(piece)
        for row in clean(raw)[0].select("file", "row", "patient_id", "minute", "variable", "value").rows()
    ]
    return sorted(rows, key=lambda row: row[:2])


def only_rejects(source: Table) -> list[tuple[Any, ...]]:
    return [
        row
        for piece in source.pieces()
        for raw in source.read(piece)
        for row in clean(raw)[1].select("reason", "row", "minute").rows()
    ]


def test_files_of_every_kind_in_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "1.csv").write_text(CSV)
    (tmp_path / "deep" / "2.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    (tmp_path / "3.tsv").write_text(CSV.replace(",", "\t"))
    pl.DataFrame({"value": [7], "minute": [0], "variable": ["HR"], "patient_id": [1], "more": [0]}).write_parquet(
        tmp_path / "4.parquet"
    )
    (tmp_path / "notes.txt").write_text("not a table")
    rows = kept_rows(Table(path=tmp_path))
    assert rows == [
        ("1.csv", 1, "a", 0.0, "HR", 80.0), ("1.csv", 2, "a", 1.5, "RR", None),
        ("3.tsv", 1, "a", 0.0, "HR", 80.0), ("3.tsv", 2, "a", 1.5, "RR", None),
        ("4.parquet", 1, "1", 0.0, "HR", 7.0),
        ("deep/2.csv.gz", 1, "a", 0.0, "HR", 80.0), ("deep/2.csv.gz", 2, "a", 1.5, "RR", None),
    ]  # fmt: skip
    assert [row[:4] for row in kept_rows(Table(path=tmp_path / "*.csv"))] == [row[:4] for row in rows[:2]]
    assert kept_rows(Table(path=tmp_path / "**" / "*.csv.gz")) == rows[5:]
    assert kept_rows(Table(path=tmp_path / "1.csv")) == rows[:2]


def test_columns_by_flags_and_by_usual_names(tmp_path: Path) -> None:
    frame = pl.DataFrame({"ts_id": [5.0], "minute": [3], "variable": ["HR"], "value": [1.0]})  # as STraTS names them
    frame.write_parquet(tmp_path / "1.parquet")
    frame.rename({"ts_id": "stay", "minute": "m", "variable": "v", "value": "x"}).write_parquet(tmp_path / "2.parquet")
    expected = [(1, "5", 3.0, "HR", 1.0)]
    assert [row[1:] for row in kept_rows(Table(path=tmp_path / "1.parquet"))] == expected
    named = Table(
        path=tmp_path / "2.parquet", patient_column="stay", minute_column="m", variable_column="v", value_column="x"
    )
    assert [row[1:] for row in kept_rows(named)] == expected


def test_names_of_categories_are_names(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"patient_id": ["b", "a"], "minute": [0.0, 1.0], "variable": ["RR", "HR"], "value": ["2", "3"]}
    )
    frame.cast(dict.fromkeys(("patient_id", "variable", "value"), pl.Categorical)).write_parquet(tmp_path / "1.parquet")
    assert [row[1:] for row in kept_rows(Table(path=tmp_path))] == [(1, "b", 0.0, "RR", 2.0), (2, "a", 1.0, "HR", 3.0)]


@pytest.mark.parametrize("dtype", [pl.Datetime("us"), pl.Datetime("ms"), pl.Datetime("ns", "Europe/Paris"), pl.String])
def test_dates_become_minutes(tmp_path: Path, dtype: Any) -> None:
    times = [NOON + datetime.timedelta(minutes=minutes) for minutes in (0, 7.25, -30)]
    column = pl.Series(times, dtype=pl.Datetime("us", "UTC" if getattr(dtype, "time_zone", None) else None))
    frame = pl.DataFrame(
        {
            "patient_id": ["a"] * 3,
            "charttime": column.dt.strftime("%Y-%m-%dT%H:%M:%S") if dtype == pl.String else column.cast(dtype),
            "admitted": [NOON, NOON, None],
            "variable": ["HR"] * 3,
            "value": [1.0] * 3,
        }
    )
    frame.write_parquet(tmp_path / "1.parquet")
    assert [
        row[3] for row in kept_rows(Table(path=tmp_path))
    ] == times  # from the first event: in pipeline.prepare.sort
    from_admission = Table(path=tmp_path, time_column="charttime", origin_column="admitted")
    assert [row[3] for row in kept_rows(from_admission)] == [0.0, 7.25]
    assert [row[:2] for row in only_rejects(from_admission)] == [("no_origin", 3)]


def test_text_that_is_no_iso_date_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text(
        "patient_id,time,variable,value\na,01/02/2020,HR,1\na,2020-13-45,HR,1\na,2020-01-02 03:04,HR,1\n"
    )
    assert only_rejects(Table(path=tmp_path)) == [("bad_minute", 1, "01/02/2020"), ("bad_minute", 2, "2020-13-45")]
    (tmp_path / "1.csv").write_text("patient_id,time,variable,value\na,01/02/2020,HR,1\n")
    assert only_rejects(Table(path=tmp_path)) == [("bad_minute", 1, "01/02/2020")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())])
def test_names_in_parquet_are_those_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    """Files of all kinds are cleaned together, whatever stores their names, and rejects have them as they came."""
    names, minutes = [" a", None, "7.0", "NA", ""], ["0", "1", "x", "3", "4"]
    table = {"patient_id": pa.array(names, pa.string()).cast(kind), "minute": minutes, "variable": ["HR "] * 5}
    pq.write_table(pa.table(table | {"value": ["1"] * 5}), tmp_path / "1.parquet")
    text = "".join(f"{name or ''},{minute},HR ,1\n" for name, minute in zip(names, minutes, strict=True))
    (tmp_path / "2.csv").write_text("patient_id,minute,variable,value\n" + text)
    source = Table(path=tmp_path)
    (raw,) = (raw for piece in source.pieces() for raw in source.read(piece))
    kept, rejected = clean(raw)
    assert kept.select("file", "row", "patient_id", "variable").rows() == [(0, 1, "a", "HR"), (1, 1, "a", "HR")]
    assert rejected.select("reason", "row", "patient_id", "variable").rows() == [
        ("no_patient", 2, None, "HR "), ("bad_minute", 3, "7.0", "HR "), ("no_patient", 4, "NA", "HR "),
        ("no_patient", 5, "", "HR "), ("no_patient", 2, None, "HR "), ("bad_minute", 3, "7.0", "HR "),
        ("no_patient", 4, "NA", "HR "), ("no_patient", 5, None, "HR "),
    ]  # fmt: skip


def test_a_column_of_names_may_hold_values_too(tmp_path: Path) -> None:
    columns = {"id": ["p", "q"], "minute": [0, 1], "code": ["1", "x"]}
    pl.DataFrame(columns).write_parquet(tmp_path / "1.parquet")
    source = Table(path=tmp_path, patient_column="id", variable_column="code", value_column="code")
    assert [row[2:] for row in kept_rows(source)] == [("p", 0.0, "1", 1.0)]


def test_names_in_parquet_that_are_no_text_are_named(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(
        pa.table({"patient_id": bad, "minute": [0], "variable": ["HR"], "value": [1]}), tmp_path / "1.parquet"
    )
    with pytest.raises(UserError, match=r"1\.parquet: column 'patient_id' holds string that is no UTF-8 text"):
        kept_rows(Table(path=tmp_path))


def test_a_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.reading.PIECE_BYTES", 4000)
    frame = pl.DataFrame(
        {"patient_id": ["a"] * 1000, "minute": range(1000), "variable": ["HR"] * 1000, "value": [1.0] * 1000}
    )
    frame.write_parquet(tmp_path / "1.parquet", row_group_size=100, compression="uncompressed")
    source = Table(path=tmp_path)
    pieces = source.pieces()
    assert len(pieces) > 1
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert [(row[1], row[3]) for row in kept_rows(source)] == [(number + 1, float(number)) for number in range(1000)]


def test_labels_use_the_patient_column_or_a_usual_one(tmp_path: Path, tabulate: Tabulate) -> None:
    (tmp_path / "1.csv").write_text(CSV.replace("patient_id", "stay"))
    for header in ("stay", "ts_id"):
        (tmp_path / "labels.csv").write_text(f"{header},died\n1.0,true\n2,False\n")
        source = Table(path=tmp_path, patient_column="stay", labels=tmp_path / "labels.csv", label_column="died")
        assert list(source.inputs()) == ["events/1.csv", "labels/labels.csv"]  # the labels are no events
        labels = source.read_labels()
        assert labels is not None
        assert tabulate(labels).rows() == [("1", 1), ("2", 0)]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"1.csv": "patient,minute,variable,value\n"}, {}, r"1\.csv: no column 'patient_id' or .*--patient_column"),
        ({"1.csv": CSV}, {"value_column": "x"}, r"1\.csv: no column 'x'; name one of .*--value_column"),
        ({"1.csv": CSV.replace("minute", "when")}, {}, "no column 'minute' or .*--minute_column or --time_column"),
        ({"1.csv": CSV}, {"set_column": "set"}, "no column 'set'"),
        ({"1.csv": CSV + "a,1,HR,1,2,3\n"}, {}, r"1\.csv: cannot be read"),
        ({"1.csv": CSV.encode() + b"a,0,\xff\xfe,1\n"}, {}, r"1\.csv: cannot be read"),
        ({"1.csv": b""}, {}, r"1\.csv: cannot be read"),
        ({"1.parquet": b"PAR1"}, {}, r"1\.parquet: cannot be read"),
        ({}, {}, "no files"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(
    tmp_path: Path, files: dict[str, str | bytes], options: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        kept_rows(Table(path=tmp_path, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("value", [[1.0]], "column 'value' holds large_list"),
        ("value", [NOON], "column 'value' holds Datetime"),
        ("minute", [NOON], "column 'minute' holds Datetime.*--time_column"),
        ("variable", [b"\xff"], "column 'variable' holds large_binary that is no UTF-8"),
    ],
)
def test_a_column_of_the_wrong_kind_is_named(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    good = {"patient_id": ["a"], "minute": [0.0], "variable": ["HR"], "value": [1.0]}
    pl.DataFrame(good | {column: values}).write_parquet(tmp_path / "1.parquet")
    with pytest.raises(UserError, match=message):
        kept_rows(Table(path=tmp_path))


def test_an_origin_that_is_no_date_is_named(tmp_path: Path) -> None:
    frame = {
        "patient_id": ["a"],
        "time": [NOON],
        "admitted": [datetime.timedelta(1)],
        "variable": ["a"],
        "value": [1.0],
    }
    pl.DataFrame(frame).write_parquet(tmp_path / "1.parquet")
    with pytest.raises(UserError, match="column 'admitted' holds Duration"):
        kept_rows(Table(path=tmp_path, origin_column="admitted"))


def test_minutes_are_no_dates(tmp_path: Path) -> None:
    pl.DataFrame({"patient_id": ["a"], "time": [0.0], "variable": ["HR"], "value": [1.0]}).write_parquet(
        tmp_path / "1.parquet"
    )
    with pytest.raises(UserError, match=r"holds Float64.*--time_unit hours, or --minute_column"):
        kept_rows(Table(path=tmp_path))
