"""The same events in other files, in another order and in other types that mean the same: the same bytes of shards."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.sources.meds import Meds
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.source import Source
from pipeline.prepare.sources.table import Table
from pipeline.prepare.splits import SplitRule
from tests.faults.conftest import cases
from tests.prepared import assign_splits

NUMBER = cases(100, 2000)
START = datetime(2024, 3, 30, 23, 59, 59)
OPTIONS = BuildOptions(split_rule=SplitRule(split_fractions=(0.5, 0.25, 0.25)), events_per_shard=16)
ALL_TRAIN = BuildOptions(split_rule=SplitRule(split_fractions=(1.0, 0.0, 0.0)), events_per_shard=16)

Row = tuple[int, int, int | str | None, float | None]
"""patient, half minutes since START, variable (None = the row is rejected), value in quarters."""

rows_of_events = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.integers(-3, 400),
        st.sampled_from([220045, 7, "HR", "Na", "a,b", None]),
        st.one_of(st.none(), st.integers(-8, 40).map(lambda quarters: quarters / 4)),
    ),
    min_size=1,
    max_size=24,
).filter(lambda rows: any(variable is not None for _, _, variable, _ in rows))


@dataclass(frozen=True)
class Form:
    """One way to store a column: the values as Arrow stores them, and as CSV shows them."""

    to_arrow: Callable[[Sequence[Any]], pa.Array]
    to_text: Callable[[Any], str]


def plain(kind: pa.DataType, of: Callable[[Any], Any] = lambda value: value) -> Callable[[Sequence[Any]], pa.Array]:
    return lambda values: pa.array([None if value is None else of(value) for value in values], kind)


def encoded(kind: pa.DataType, of: Callable[[Any], Any]) -> Callable[[Sequence[Any]], pa.Array]:
    return lambda values: plain(kind, of)(values).dictionary_encode()


def is_whole(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) for value in values if value is not None)


TEXTS = [
    Form(plain(pa.string(), str), str),
    Form(plain(pa.large_string(), lambda name: f" {name}"), lambda name: f"{name} "),
    Form(plain(pa.string_view(), str), lambda name: f" {name} "),
    Form(plain(pa.binary(), lambda name: str(name).encode()), str),
    Form(encoded(pa.string(), str), str),
]
WHOLE = [
    Form(plain(pa.int64()), lambda name: f"{name}.0"),
    Form(plain(pa.uint32()), lambda name: f"{name}.00"),
    Form(plain(pa.float64(), float), str),
    Form(plain(pa.float32(), float), str),
    Form(plain(pa.decimal128(20, 2), Decimal), str),
    Form(encoded(pa.int64(), int), str),
]
NUMBERS = [
    Form(plain(pa.float64()), repr),
    Form(plain(pa.float32()), lambda value: f" {value:+.9e}"),
    Form(plain(pa.float64(), lambda value: value), lambda value: f"{value:.4f}"),
    Form(plain(pa.decimal128(12, 4), lambda value: Decimal(str(value))), repr),
    Form(plain(pa.string(), str), str),
    Form(encoded(pa.float64(), float), repr),
]
BLANK = ["", "  "]
MISSING = ["", "NA", "NULL", "nan", r"\N", "  "]
MINUTES = [
    *NUMBERS,
    Form(plain(pa.duration("us"), lambda minute: timedelta(minutes=minute)), lambda minute: f"PT{minute * 60:.0f}S"
         if minute >= 0 else f"-PT{-minute * 60:.0f}S"),
    Form(plain(pa.duration("s"), lambda minute: timedelta(minutes=minute)), lambda minute:
         f"{timedelta(minutes=minute)}"),
]  # fmt: skip


def at(minute: float) -> datetime:
    return START + timedelta(minutes=minute)


def zoned(minute: float, zone: str) -> datetime:
    return at(minute).replace(tzinfo=UTC).astimezone(ZoneInfo(zone))


TIMES = [
    Form(plain(pa.timestamp("s"), at), lambda minute: at(minute).isoformat()),
    Form(plain(pa.timestamp("ms"), at), lambda minute: at(minute).isoformat(" ")),
    Form(plain(pa.timestamp("ns"), at), lambda minute: at(minute).isoformat() + ".000Z"),
    Form(plain(pa.timestamp("us", "Asia/Tokyo"), lambda minute: zoned(minute, "UTC")), lambda minute:
         zoned(minute, "Asia/Tokyo").isoformat()),
    Form(plain(pa.timestamp("us", "Europe/Paris"), lambda minute: zoned(minute, "UTC")), lambda minute:
         zoned(minute, "Europe/Paris").isoformat(" ")),
    Form(plain(pa.string(), lambda minute: f"{at(minute):%Y/%m/%d %H:%M:%S} UTC"), lambda minute:
         f"{at(minute):%Y-%m-%d %H:%M:%S}Z"),
]  # fmt: skip


def write_parquet(path: Path, columns: dict[str, pa.Array], chance: random.Random) -> None:
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=chance.randint(1, 9),
                   use_deprecated_int96_timestamps=chance.random() < 0.2)  # fmt: skip


def write_csv(path: Path, columns: dict[str, list[str]], chance: random.Random) -> None:
    separator, suffix = chance.choice([(",", ".csv"), ("\t", ".tsv"), ("|", ".psv")])
    text = io.StringIO(newline="")
    quoting = chance.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    writer = csv.writer(text, delimiter=separator, lineterminator=chance.choice(["\n", "\r\n"]), quoting=quoting)
    writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    content = text.getvalue().encode()
    packed = chance.choice(["", ".gz", ".bz2", ".zst"])
    if packed == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    elif packed:
        content = {".gz": gzip.compress, ".bz2": bz2.compress}[packed](content)
    path.with_name(path.name + suffix + packed).write_bytes(content)


def write_part(path: Path, rows: Sequence[Row], chance: random.Random, names: Sequence[str], *, csv: bool) -> None:
    """Write rows in forms of chance; ``names`` are those of patient (or ""), time, variable, value."""
    columns: dict[str, tuple[Form, list[Any]]] = {}
    patient, time, variable, value = names
    ids, halves, variables, values = ([row[at] for row in rows] for at in range(4))
    order = [(patient, [*WHOLE, *TEXTS], ids), (time, MINUTES if time.startswith("minute") else TIMES,
             [half / 2 for half in halves]), (variable, [*WHOLE, *TEXTS] if is_whole(variables) else TEXTS, variables),
             (value, NUMBERS, values)]  # fmt: skip
    chance.shuffle(order)
    for name, forms, column in order:
        if name:
            columns[name] = (chance.choice(forms), column)
    if csv:
        texts = {
            name: [chance.choice(missing) if item is None else form.to_text(item) for item in column]
            for name, (form, column) in columns.items()
            for missing in [BLANK if name == variable else MISSING]
        }
        write_csv(path, texts, chance)
    else:
        write_parquet(path, {name: form.to_arrow(column) for name, (form, column) in columns.items()}, chance)


def deal(rows: list[Row], chance: random.Random) -> list[list[Row]]:
    """Return the rows in another order, in one file or several."""
    rows = chance.sample(rows, len(rows))
    bounds = sorted(chance.randint(0, len(rows)) for _ in range(chance.randint(0, 3)))
    parts = [rows[start:stop] for start, stop in zip([0, *bounds], [*bounds, len(rows)], strict=True)]
    return [part for part in parts if part]


def write_table(folder: Path, rows: list[Row], chance: random.Random, time: str) -> Source:
    for number, part in enumerate(deal(rows, chance)):
        deep = folder / chance.choice(["", "deep", "deep/er"])
        deep.mkdir(parents=True, exist_ok=True)
        value = chance.choice(["value", "valuenum", "numeric_value"])
        names = (chance.choice(["patient_id", "stay_id"]), time, chance.choice(["variable", "itemid"]), value)
        write_part(deep / f"{number}", part, chance, names, csv=chance.random() < 0.5)
    return Table(path=folder)


def write_meds(folder: Path, rows: list[Row], chance: random.Random, time: str) -> Source:
    del time
    for number, part in enumerate(deal(rows, chance)):
        path = folder / "data" / chance.choice(["", "train"]) / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_part(path, part, chance, ("subject_id", "time", "code", "numeric_value"), csv=False)
    return Meds(path=folder)


def write_patient_files(folder: Path, rows: list[Row], chance: random.Random, time: str) -> Source:
    for patient in {row[0] for row in rows}:
        path = folder / "train" / f"{patient}{chance.choice(['', '.0'])}.parquet"
        path.parent.mkdir(exist_ok=True)
        mine = [row for row in rows if row[0] == patient]
        write_part(
            path.with_suffix(""), chance.sample(mine, len(mine)), chance, ("", time, "variable", "value"), csv=False
        )
        path.with_suffix("").with_suffix(".parquet").rename(path)
    return PatientFiles(path=folder)


def bytes_of(source: Source, output: Path, options: BuildOptions) -> dict[str, bytes]:
    build(source, output, options)
    files = [path for path in output.rglob("*.parquet") if path.name != "rejects.parquet"]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def write_plain(folder: Path, rows: list[Row], time: str) -> Source:
    """The same events as one Parquet file of plain columns, in order."""
    ids, halves, variables, values = (list(column) for column in zip(*rows, strict=True))
    minutes = [half / 2 for half in halves]
    columns = {
        "patient_id": pa.array(list(map(str, ids))),
        time: pa.array(minutes) if time == "minute" else pa.array(list(map(at, minutes)), pa.timestamp("us")),
        "variable": pa.array([None if variable is None else str(variable) for variable in variables]),
        "value": pa.array(values, pa.float64()),
    }
    pq.write_table(pa.table(columns), folder / "plain.parquet")
    return Table(path=folder / "plain.parquet")


@pytest.mark.parametrize("write", [write_table, write_meds, write_patient_files], ids=lambda write: write.__name__)
def test_the_same_events_give_the_same_bytes(write: Any, tried: Callable[[str, int], None]) -> None:
    number = {write_table: NUMBER - 2 * (NUMBER // 4)}.get(write, NUMBER // 4)
    options = ALL_TRAIN if write is write_patient_files else OPTIONS

    @settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows_of_events, st.integers(0, 2**32), st.booleans())
    def holds(rows: list[Row], seed: int, are_dates: bool) -> None:
        rows = sorted(set(rows), key=str)  # which of equal rows is kept is no matter of bytes, how many there are is
        rows += rows[:1] if seed % 2 else []
        chance = random.Random(seed)
        time = "time" if write is write_meds or are_dates else "minute"
        kept = [str(patient) for patient, _, variable, _ in rows if variable is not None]
        if not any(split == 0 for split in assign_splits(OPTIONS.split_rule, kept)):
            rows = [(2, *rows[0][1:]), *[(6, *row[1:]) for row in rows]]
            options_here = ALL_TRAIN
        else:
            options_here = options
        with tempfile.TemporaryDirectory() as name:
            top = Path(name)
            (top / "in").mkdir()
            expected = bytes_of(write_plain(top, rows, time), top / "plain", options_here)
            source = write(top / "in", rows, chance, time)
            small = chance.choice([1, 200, 1 << 26])
            with (
                patch("pipeline.prepare.sources.reading.PIECE_BYTES", small),
                patch("pipeline.prepare.sources.csv_files.PIECE_BYTES", small),
                patch("pipeline.prepare.sources.table.PIECE_BYTES", small),
                patch("pipeline.prepare.sources.csv_files.BLOCK_BYTES", chance.choice([64, 1 << 22])),
                patch("pipeline.prepare.sources.table.CHUNK_ROWS", chance.choice([2, 1 << 20])),
                patch("pipeline.prepare.spill.SPILL_ROWS", chance.choice([3, 1 << 20])),
                patch("pipeline.prepare.stages.MAX_SPILLS", chance.choice([2, 3, 1024])),
                patch("pipeline.prepare.merge.STEP_ROWS", chance.choice([5, 1 << 22])),
            ):
                assert bytes_of(source, top / "out", options_here) == expected

    holds()
    tried("same events in other files, order and types, same bytes", number)
