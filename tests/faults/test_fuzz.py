"""Any bytes as input of any format: a data set whose counts add up, or one clear line; no traceback and no hang."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocess
from tests.faults.conftest import cases, full_only
from tests.prepared import read_prepared

Tried = Callable[[str, int], None]
NUMBER = cases(25, 2200)
ODD = [
    *["", " ", "0", "1", "-0.0", "1e18", "-1e18", "1e400", "nan", "NA", "inf", "-", "00:07", "48:00", "99:99", "1.0"],
    *["200001.0", "../../etc/passwd", "a/b", "\u0430", "a", "\u212b", "\x00", "\ufeff", "'", chr(34), "<b>", "=1+1"],
    *["RecordID", "HR", "<padding>", "<unknown>", "2020-01-01", "2020-01-01T00:00:00Z", "x" * 5000],
]
cell = st.one_of(st.sampled_from(ODD), st.text(max_size=5), st.integers(-3, 99).map(str), st.floats().map(repr))
quiet = settings(max_examples=NUMBER, deadline=None, suppress_health_check=list(HealthCheck))


def prepare(write: Callable[[Path], Path], *flags: str) -> dict[str, Any] | None:
    """The summary, checked against what was written; None where the input was refused."""
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "in").mkdir()
        path, errors = write(folder / "in"), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = preprocess.main([str(path), "--output", str(folder / "out"), "--workers", "1", *flags])
        if status:
            assert status == 2
            assert errors.getvalue().splitlines()[-1].startswith("preprocess.py: ")
            assert not (folder / "out").exists(), "nothing is left"
            return None
        summary: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
        prepared = read_prepared(folder / "out")
        events = sum(len(s) for split in prepared.patients.values() for *_, sets in split for _, s in sets)
        assert summary["events_written"] == events
        assert summary["events_in"] == events + prepared.rejects.total()
        assert summary["rejects"] == dict(prepared.rejects)
        return {**summary, "prepared": prepared}
    finally:
        shutil.rmtree(folder)


def written_to(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return folder

    return write


rows = st.lists(st.lists(cell, min_size=1, max_size=6), max_size=12)
ends = st.sampled_from(["\n", "\r\n", "\r"])
headers = st.sampled_from(
    ["patient_id,minute,variable,value", "patient_id,time,code,value", "\ufeffpatient_id,minute,variable,value",
     "patient_id,minute,variable,value,value", "ts_id,minute,variable,value,set_index", "", "a"]
)  # fmt: skip


@quiet
@given(headers, rows, ends, st.binary(max_size=8), st.booleans())
def fuzz_csv(header: str, body: list[list[str]], end: str, junk: bytes, quoted: bool) -> None:
    lines = [header] + [",".join(f'"{text}"' if quoted else text for text in row) for row in body]
    content = end.join(lines).encode("utf-8", "surrogatepass") + junk
    prepare(written_to("events.csv", content), "--format", "table", "--split_fractions", "1,0,0")


@quiet
@given(st.lists(st.tuples(cell, cell, cell), max_size=12), ends, st.binary(max_size=6), st.booleans())
def fuzz_records(body: list[tuple[str, str, str]], end: str, junk: bytes, whole: bool) -> None:
    header = "Time,Parameter,Value" if whole else "Time,Parameter"
    content = end.join([header, "00:00,RecordID,7", *map(",".join, body)]).encode("utf-8", "surrogatepass") + junk
    prepare(written_to("7.txt", content), "--format", "physionet2012", "--split_fractions", "1,0,0")


columns = st.sampled_from(
    [pl.Int64, pl.Float64, pl.Float32, pl.String, pl.Boolean, pl.Null, pl.UInt8, pl.Int8, pl.Datetime("us"), pl.Date,
     pl.Datetime("ns", "UTC"), pl.Binary, pl.List(pl.Int8), pl.Categorical, pl.Decimal(10, 2), pl.Time,
     pl.Duration("us")]
)  # fmt: skip


@st.composite
def frames(draw: st.DrawFn, names: list[str]) -> pl.DataFrame:
    height = draw(st.integers(0, 6))
    values = st.lists(st.one_of(st.none(), st.integers(-5, 2**62), cell), min_size=height, max_size=height)
    made = {}
    for name in names:
        series = pl.Series(name, [None if x is None else str(x) for x in draw(values)], dtype=pl.String)
        kind = draw(st.one_of(st.just(pl.String), st.just(pl.Float64), st.just(pl.Int64), columns))
        try:
            if isinstance(kind, pl.Datetime | pl.Date | pl.Time | pl.Duration):
                series = series.cast(pl.Int64, strict=False).cast(kind, strict=False)
            else:
                series = series.cast(kind, strict=False)
        except pl.exceptions.PolarsError:
            series = pl.Series(name, [None] * height, dtype=kind)
        if draw(st.integers(0, 19)):
            made[name] = series
    return pl.DataFrame(made)


def write_frame(name: str, frame: pl.DataFrame, harm: int | None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)
        if harm is not None:
            content = bytearray(path.read_bytes())
            content[harm % len(content)] ^= 1 << harm % 8
            path.write_bytes(content)
        return folder

    return write


harms = st.one_of(st.none(), st.integers(0, 1 << 20))


@quiet
@given(frames(["patient_id", "minute", "variable", "value"]), harms)
def fuzz_parquet(frame: pl.DataFrame, harm: int | None) -> None:
    prepare(write_frame("events.parquet", frame, harm), "--format", "table", "--split_fractions", "1,0,0")


@quiet
@given(frames(["subject_id", "time", "code", "numeric_value"]), harms)
def fuzz_meds(frame: pl.DataFrame, harm: int | None) -> None:
    prepare(write_frame("data/0.parquet", frame, harm), "--format", "meds", "--split_fractions", "1,0,0")


@quiet
@given(frames(["minute", "variable", "value"]), harms)
def fuzz_patient_files(frame: pl.DataFrame, harm: int | None) -> None:
    prepare(write_frame("train/1.0.parquet", frame, harm), "--format", "patient_files")


@quiet
@given(st.lists(st.sampled_from(["stay_id", "time", "minute", "HR", "sex", "label", "", " "]), max_size=6), rows, ends,
       st.binary(max_size=6), st.sampled_from(["", ".gz"]))  # fmt: skip
def fuzz_wide(header: list[str], body: list[list[str]], end: str, junk: bytes, packed: str) -> None:
    lines = ["|".join(header), *("|".join(text.replace("|", "") for text in row) for row in body)]
    content = end.join(lines).encode("utf-8", "surrogatepass") + junk
    content = gzip.compress(content) + junk if packed else content
    prepare(written_to(f"events.psv{packed}", content), "--wide", "--split_fractions", "1,0,0")


@quiet
@given(rows, ends, st.binary(max_size=6))
def fuzz_physionet2019(body: list[list[str]], end: str, junk: bytes) -> None:
    lines = ["HR|Age|ICULOS|SepsisLabel", *("|".join(row) for row in body)]
    content = end.join(lines).encode("utf-8", "surrogatepass") + junk
    prepare(written_to("set/p1.psv", content), "--format", "physionet2019", "--split_fractions", "1,0,0")


@quiet
@given(frames(["stay_id", "time", "hr", "sex"]), harms)
def fuzz_yaib(frame: pl.DataFrame, harm: int | None) -> None:
    prepare(write_frame("dyn.parquet", frame, harm), "--format", "yaib", "--split_fractions", "1,0,0")


FUZZ = [fuzz_csv, fuzz_records, fuzz_parquet, fuzz_meds, fuzz_patient_files, fuzz_wide, fuzz_physionet2019, fuzz_yaib]


@pytest.mark.parametrize("fuzz", FUZZ)
def test_any_input_is_prepared_or_refused(fuzz: Callable[[], None], tried: Tried) -> None:
    fuzz()
    tried(f"{fuzz.__name__.removeprefix('fuzz_')} as input, fuzzed", NUMBER)


HEAD = b"patient_id,minute,variable,value\n"


@pytest.mark.parametrize(
    ("content", "patients", "rejects"),
    [
        (b"\xef\xbb\xbf" + HEAD + b"p,1,HR,2\n", {"p"}, {}),
        (HEAD.replace(b"\n", b"\r\n") + b"p,1,HR,2\r\np,2,HR,3\r\n", {"p"}, {}),
        (HEAD + b'"a,b",1,"H ""R""\n",2\n', {"a,b"}, {}),
        (HEAD + "../../etc,1,HR,2\na b,1,HR,2\n/x,1,HR,2\n\u0430,1,HR,2\na,1,HR,2\n".encode(),
         {"../../etc", "a b", "/x", "\u0430", "a"}, {}),
        (HEAD + b"p,1e18,HR,2\nq,-1e18,HR,2\nq,1e308,HR,2\nq,1e309,HR,2\n", {"p", "q"}, {"bad_minute": 2}),
        (HEAD + b"p,1,HR,yes\np,2,HR,7\n", {"p"}, {"bad_value": 1}),
        (HEAD + b"p,1," + b"n" * 10**6 + b",2\n", {"p"}, {}),
        (b"patient_id,minute,variable,value,value\np,1,HR,2,3\n", None, {}),
        (HEAD + b"p,1,H\xff,2\n", None, {}),
        (HEAD, None, {}),
        (b"", None, {}),
    ],
)  # fmt: skip
def test_odd_tables_by_hand(content: bytes, patients: set[str] | None, rejects: dict[str, int]) -> None:
    summary = prepare(written_to("a.csv", content), "--format", "table", "--split_fractions", "1,0,0")
    if patients is None:
        assert summary is None
        return
    assert summary is not None
    assert {patient[0] for patient in summary["prepared"].patients["train"]} == patients
    assert summary["rejects"] == rejects


@full_only
def test_one_patient_of_five_million_events(tried: Tried) -> None:
    """Two pieces of a large table; one shard holds them all."""
    number = 5_000_000

    def write(folder: Path) -> Path:
        table = {"patient_id": pa.repeat("p", number), "minute": np.arange(number, dtype=np.float64) // 3}
        table |= {"variable": pa.repeat("HR", number), "value": np.arange(number, dtype=np.float32)}
        pq.write_table(pa.table(table), folder / "a.parquet", row_group_size=1 << 20)
        return folder

    folder = Path(tempfile.mkdtemp())
    write(folder)
    out = folder / "out"
    given = [str(folder / "a.parquet"), "--output", str(out), "--workers", "1", "--split_fractions", "1,0,0"]
    assert preprocess.main(given) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["patients"], summary["events_written"]) == (1, number)
    shutil.rmtree(folder)
    tried("events of one patient", number)


@full_only
def test_a_million_patients_of_one_event(tried: Tried) -> None:
    number, folder = 1_000_000, Path(tempfile.mkdtemp())
    table = {"patient_id": np.arange(number), "minute": np.zeros(number), "variable": pa.repeat("HR", number)}
    pq.write_table(pa.table(table | {"value": np.arange(number, dtype=np.float32)}), folder / "a.parquet")
    given = [str(folder / "a.parquet"), "--output", str(folder / "out"), "--workers", "1"]
    assert preprocess.main(given) == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["patients"], summary["events_written"]) == (number, number)
    shutil.rmtree(folder)
    tried("patients of one event", number)
