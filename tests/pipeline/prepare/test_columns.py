from __future__ import annotations

from datetime import datetime, time
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.prepare import columns
from pipeline.prepare.times import parse_durations, parse_instants
from pipeline.schema import UserError


def plain(array: pa.Array) -> pl.Series:
    return columns.to_plain(Path("file"), "column", pa.chunked_array([array]))


@pytest.mark.parametrize(
    ("array", "names"),
    [
        (pa.array([1, None], pa.int8()), ["1", None]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([1.0, 1.5, float("nan"), float("inf"), 1e20, -0.0]), ["1", "1.5", None, None, str(10**20), "0"]),
        (pa.array(np.array([1.5], np.float16)), ["1.5"]),
        (pa.array([b"ab"], pa.binary()), ["ab"]),
        (pa.array([b"ab\0\0"], pa.binary(4)), ["ab"]),
        (pa.array(["ab"], pa.string_view()), ["ab"]),
        (pa.array([b"ab"], pa.binary_view()), ["ab"]),
        (pa.array([7, 7, None]).dictionary_encode(), ["7", "7", None]),
        (pc.run_end_encode(pa.array([7, 7, 8])), ["7", "7", "8"]),
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"\0" * 16], pa.binary(16))), [str(UUID(int=0))]),
        (pa.array([" a ", "1.00", "00123", "-0.0", "a.0", "NULL", r"\N", "", "Na", "1.50"]),
         ["a", "1", "00123", "0", "a.0", None, None, None, "Na", "1.50"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)  # fmt: skip
def test_names_of_every_type(array: pa.Array, names: list[str | None]) -> None:
    assert columns.to_variable_names(plain(array)).to_list() == names


def test_a_patient_may_not_be_named_na() -> None:
    texts = pl.Series(["NA", "n/a", "p"])
    assert columns.to_patient_names(texts).to_list() == [None, None, "p"]
    assert columns.to_variable_names(texts).to_list() == ["NA", "n/a", "p"]


@pytest.mark.parametrize(
    "array", [pa.array([[1]]), pa.array([{"a": 1}]), pa.array([time(1)]), pa.array([b"SECRET\xff"])]
)
def test_other_types_are_refused_without_a_value(array: pa.Array) -> None:
    with pytest.raises(UserError, match="file: column 'column' holds ") as error:
        plain(array)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2150-01-02 03:04:05", datetime(2150, 1, 2, 3, 4, 5)),
        ("2150-01-02T03:04:05.678901234Z", datetime(2150, 1, 2, 3, 4, 5, 678901)),
        ("2150-01-02t03:04z", datetime(2150, 1, 2, 3, 4)),
        ("2150/1/2 3:04", datetime(2150, 1, 2, 3, 4)),
        ("2150-01-02", datetime(2150, 1, 2)),
        ("2150-01-02 03:04:05 GMT", datetime(2150, 1, 2, 3, 4, 5)),
        ("2150-01-02 03:04:05+01", datetime(2150, 1, 2, 2, 4, 5)),
        ("2150-01-02 03:04:05-0130", datetime(2150, 1, 2, 4, 34, 5)),
        ("2150-01-02 03:04:05 PM", None), ("01/02/2150", None), ("2150-13-01", None), ("2150-02-30", None),
        ("2150-01-02 25:00", None), ("7.5", None), ("", None), ("20500102", None),
    ],
)  # fmt: skip
def test_instants_as_text(text: str, instant: datetime | None) -> None:
    assert parse_instants(pl.Series([text])).to_list() == [instant]
    assert columns.to_instants(pl.Series([f" {text} ", text])).to_list() == [instant, instant]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("PT1H30M", 90.0), ("-PT90S", -1.5), ("P1DT0.5S", 1440 + 0.5 / 60), ("0 days 01:30:00", 90.0),
        ("-1 days +23:00:00", -60.0), ("-1 day, 23:00:00", -60.0), ("1:00:30", 60.5), ("2 days", 2880.0),
        ("P", None), ("PT", None), ("", None), ("7", None), ("soon", None), ("1:2", None),
    ],
)  # fmt: skip
def test_durations_as_text(text: str, minutes: float | None) -> None:
    assert parse_durations(pl.Series([text])).to_list() == [minutes]


@pytest.mark.parametrize(
    ("unit", "ticks", "instant"),
    [
        ("s", -1, datetime(1969, 12, 31, 23, 59, 59)),
        ("ns", -1, datetime(1969, 12, 31, 23, 59, 59, 999999)),
        ("ms", 253402300799000, datetime(9999, 12, 31, 23, 59, 59)),
        ("s", 2**60, None),
    ],
)
def test_instants_of_every_unit(unit: str, ticks: int, instant: datetime | None) -> None:
    assert plain(pa.array([ticks], pa.timestamp(unit))).to_list() == [instant]


@pytest.mark.parametrize(
    ("values", "whole"),
    [(["9007199254740993", "3.0", "3.5", "x", None], [9007199254740993, 3, None, None, None]), ([2.0, 2.5], [2, None])],
)
def test_whole_numbers(values: list[Any], whole: list[int | None]) -> None:
    assert columns.to_whole_numbers(pl.Series(values)).to_list() == whole


def test_the_form_of_a_text_has_nothing_of_its_content() -> None:
    assert columns.describe_form("01/02/2150 05:00 Ünal-7") == "##/##/#### ##:## aaaa-#"
