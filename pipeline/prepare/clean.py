"""Turn rows as they came into canonical rows that are kept, and rejected rows with a reason.

Every row goes to exactly one of the two.  No row is an error: a row that cannot be used is a reject.
"""

from __future__ import annotations

from typing import Final

import polars as pl
import pyarrow as pa

from pipeline.prepare import names
from pipeline.prepare.sources.reading import AS_TEXT, FILE, ROW, to_patient_ids
from pipeline.prepare.sources.source import RawRows
from pipeline.schema import FLOAT32_MAX, MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE

DUPLICATE: Final = "duplicate"
NO_ORIGIN: Final = "no_origin"
"""Reasons that pipeline.prepare.sort finds, because they need all rows of a patient together."""

RESERVED_VARIABLES: Final = ("<padding>", "<unknown>")
"""Names of the first two rows of the vocabulary, which no variable may have."""

NO_NUMBER: Final = ("", "na", "nan", "null")
"""Texts, in upper or lower case, which say that an event has no number."""

REJECTS_SCHEMA: Final = pa.schema(
    [
        pa.field("reason", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # relative to the input
        pa.field("row", pa.int64(), nullable=False),  # data row of the file, from 1
        *(pa.field(name, pa.string()) for name in (PATIENT_ID, MINUTE, VARIABLE, VALUE)),  # as they came
    ]
)


def clean(raw: RawRows) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the rows to keep, and the rows to reject with ``reason``, ``file``, ``row`` and the others as text.

    Those to keep have ``file`` uint32, ``row`` int64, ``patient_id`` and ``variable`` as ``pipeline.prepare.names``,
    ``minute`` float64, or ``Datetime("us")`` and null where static, ``value`` float32 and null where there is no
    number, and ``set_index`` int64 where the input has it.
    """
    rows = raw.rows
    set_columns = [SET_INDEX] if SET_INDEX in rows.columns else []
    patient = names.encode(rows[PATIENT_ID], to_patient_ids)
    variable = names.encode(rows[VARIABLE])
    minute = (_to_number(rows, MINUTE) if raw.minute is None else raw.minute).alias(MINUTE)
    value = _to_number(rows, VALUE).cast(pl.Float32).fill_nan(None)
    set_index = [_to_whole_number(rows, name) for name in set_columns]
    typed = rows.select(FILE, ROW, patient, minute, variable, value, *set_index)
    minute, value = pl.col(MINUTE), pl.col(VALUE)
    instants, outside = typed.schema[MINUTE].is_temporal(), ~(minute.abs() <= FLOAT32_MAX).fill_null(False)
    rules: dict[str, pl.Expr | pl.Series] = {
        "no_patient": names.test(patient, is_blank).fill_null(True),
        "no_variable": names.test(variable, is_blank).fill_null(True),
        "reserved_variable": names.test(variable, lambda name: name.is_in(RESERVED_VARIABLES)).fill_null(False),
        "bad_minute": minute.is_null() & (not raw.static) if instants else outside,
        "bad_value": value.is_null() & rows.select(_has_number(rows)).to_series(),
        "infinite_value": value.is_infinite(),
        **{f"bad_{name}": pl.col(name).is_null() for name in set_columns},
    }
    by_format = rows.select(rule.alias(reason) for reason, rule in raw.rules)
    by_column = typed.select(rule.alias(reason) for reason, rule in rules.items())
    broken = pl.concat([by_format, by_column], how="horizontal")
    reasons = [column.name for column in broken if column.any()]  # mostly none
    numbers = [pl.when(reason).then(pl.lit(number, pl.UInt8)) for number, reason in enumerate(reasons)]
    first = broken.select(pl.coalesce(numbers or pl.repeat(None, pl.len(), dtype=pl.UInt8))).to_series()
    kept = typed.filter(first.is_null()) if reasons else typed
    kept = kept.with_columns(_without_negative_zero(name) for name in (MINUTE, VALUE) if kept.schema[name].is_float())
    reason = pl.Series("reason", reasons, dtype=pl.String).gather(first.drop_nulls())
    return kept, rows.filter(first.is_not_null()).select(reason, FILE, ROW, AS_TEXT)


def is_blank(name: pl.Series) -> pl.Series:
    """Return [N] bool, whether a name consists of blanks."""
    return name.str.strip_chars() == ""


def _to_number(rows: pl.DataFrame, name: str) -> pl.Expr:
    """Return column ``name`` as float64; null where it holds no number, infinite where float64 cannot hold it."""
    column = pl.col(name)
    return (column.str.strip_chars() if rows.schema[name] == pl.String else column).cast(pl.Float64, strict=False)


def _to_whole_number(rows: pl.DataFrame, name: str) -> pl.Expr:
    """Return column ``name`` as int64; null where it holds no whole number."""
    if rows.schema[name].is_integer():
        return pl.col(name).cast(pl.Int64, strict=False)
    number = _to_number(rows, name)
    return pl.when(number == number.floor()).then(number).cast(pl.Int64, strict=False)


def _has_number(rows: pl.DataFrame) -> pl.Expr:
    """Return whether the value is meant to be a number."""
    value = pl.col(VALUE)
    if rows.schema[VALUE] == pl.String:
        return value.is_not_null() & ~value.str.strip_chars().str.to_lowercase().is_in(NO_NUMBER)
    return value.is_not_null() & value.is_not_nan() if rows.schema[VALUE].is_float() else value.is_not_null()


def _without_negative_zero(name: str) -> pl.Expr:
    """Return the column with 0.0 for -0.0: rows that differ in it alone are duplicates."""
    column = pl.col(name)
    zero_or_column = pl.when(column == 0).then(pl.lit(0.0)).otherwise(column)
    return zero_or_column.cast(pl.Float32 if name == VALUE else pl.Float64).alias(name)
