from __future__ import annotations

import datetime
import math
from typing import Any

import polars as pl
import pytest

from pipeline.prepare.clean import REJECTS_SCHEMA, clean
from pipeline.prepare.sources.reading import number_rows
from pipeline.prepare.sources.source import RawRows

GOOD: dict[str, Any] = {"patient_id": "p", "minute": 1.0, "variable": "HR", "value": 80.0}


def cleaned(*changes: dict[str, Any], **raw: Any) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = [GOOD | change for change in changes]
    columns = {name: pl.Series(name, [row[name] for row in rows], strict=False) for name in rows[0]}
    return clean(RawRows(rows=number_rows(columns), **raw))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"patient_id": None}, "no_patient"),
        ({"patient_id": ""}, "no_patient"),
        ({"patient_id": " \t"}, "no_patient"),
        ({"variable": None}, "no_variable"),
        ({"variable": ""}, "no_variable"),
        ({"variable": "  "}, "no_variable"),
        ({"variable": "<unknown>"}, "reserved_variable"),
        ({"minute": None}, "bad_minute"),
        ({"minute": math.nan}, "bad_minute"),
        ({"minute": math.inf}, "bad_minute"),
        ({"minute": -math.inf}, "bad_minute"),
        ({"minute": "soon"}, "bad_minute"),
        ({"minute": ""}, "bad_minute"),
        ({"value": math.inf}, "infinite_value"),
        ({"value": -math.inf}, "infinite_value"),
        ({"value": 1e39}, "infinite_value"),
        ({"value": "1e999"}, "infinite_value"),
        ({"value": "high"}, "bad_value"),
        ({"value": "1,5"}, "bad_value"),
        ({"set_index": None}, "bad_set_index"),
        ({"set_index": 1.5}, "bad_set_index"),
        ({"set_index": "x"}, "bad_set_index"),
        ({"patient_id": None, "minute": None}, "no_patient"),  # the first reason that fits
    ],
)
def test_a_row_that_cannot_be_used_is_a_reject_with_its_reason(change: dict[str, Any], reason: str) -> None:
    good = {"set_index": 1} if "set_index" in change else {}
    kept, rejected = cleaned(good, good | change, good)
    assert rejected["reason"].to_list() == [reason]
    assert rejected["row"].to_list() == [2]
    assert kept["row"].to_list() == [1, 3]
    for name in ("patient_id", "minute", "variable", "value"):  # as it came, as text
        value = (GOOD | change)[name]
        assert rejected[name][0] == (
            value if value is None or isinstance(value, str) else str(pl.Series([value]).cast(pl.String)[0])
        )


@pytest.mark.parametrize(
    ("value", "kept_as"),
    [
        (None, None), (math.nan, None), ("", None), (" ", None), ("NaN", None), ("NA", None), ("null", None),
        (0, 0.0), (-3, -3.0), ("0", 0.0), (" 1.5 ", 1.5), ("+2e1", 20.0), (True, 1.0), ("-0.0", 0.0), (3.4e38, 3.4e38),
    ],
)  # fmt: skip
def test_a_value_is_a_number_or_none(value: Any, kept_as: float | None) -> None:
    kept, rejected = cleaned({"value": value})
    assert rejected.height == 0
    assert kept.schema["value"] == pl.Float32
    assert kept["value"].to_list() == ([None] if kept_as is None else pl.Series([kept_as], dtype=pl.Float32).to_list())
    assert kept_as != 0 or math.copysign(1, kept["value"][0]) == 1


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (1.5, "1.5"),
        (3, "3"),
        ("1:30", "1:30"),
        (datetime.timedelta(minutes=90), "PT1H30M"),
        (datetime.datetime(2020, 1, 2, 3), "2020-01-02 03:00:00.000000"),
        (None, None),
    ],
)
@pytest.mark.parametrize("name", ["patient_id", "variable"])
def test_what_is_rejected_shows_times_of_every_type(name: str, time: Any, text: str | None) -> None:
    _, rejected = cleaned({"minute": time}, {"minute": time, name: None})
    assert rejected.filter(pl.col("row") == 2)["minute"].to_list() == [text]


def test_minutes_may_be_negative_and_text() -> None:
    kept, _ = cleaned({"minute": "-61.5"}, {"minute": " 2880 "})
    assert kept["minute"].to_list() == [-61.5, 2880.0]


def test_patient_ids_that_are_whole_numbers_lose_their_fraction() -> None:
    assert cleaned({"patient_id": 200001.0})[0]["patient_id"].to_list() == ["200001"]
    assert cleaned({"patient_id": "200001.0"})[0]["patient_id"].to_list() == ["200001"]
    assert cleaned({"patient_id": 7})[0]["patient_id"].to_list() == ["7"]
    odd = ["a.0", "1.50", "../ü", "0x1.0"]
    assert cleaned(*({"patient_id": name} for name in odd))[0]["patient_id"].to_list() == odd


def test_the_rules_of_a_format_come_first() -> None:
    rules = (("descriptor", pl.col("variable") == "HR"),)
    _, rejected = cleaned({"patient_id": None}, {"variable": "RR", "minute": None}, rules=rules)
    assert rejected["reason"].to_list() == ["descriptor", "bad_minute"]


def test_instants_stay_instants() -> None:
    when = datetime.datetime(2020, 1, 1, 12, 30)
    kept, rejected = cleaned({"minute": when}, {"minute": None}, minute=pl.col("minute"))
    assert kept["minute"].to_list() == [when]
    assert rejected["reason"].to_list() == ["bad_minute"]
    assert rejected["minute"].to_list() == [None]


def test_no_rows_at_all() -> None:
    empty = number_rows({name: pl.Series(name, []) for name in GOOD})
    kept, rejected = clean(RawRows(rows=empty))
    assert kept.height == rejected.height == 0
    assert set(REJECTS_SCHEMA.names) == set(rejected.columns)
