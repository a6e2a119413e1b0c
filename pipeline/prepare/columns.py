"""The rules of the canonical columns, one for all sources: types, canonical form, what is missing, what is refused.

``docs/format.md`` has the rules as a table.  A column first becomes one of few *plain* types, whatever Arrow, Parquet
or CSV stored it as (:func:`to_plain`); the rule of its role then makes canonical values of it.  A rule looks at one
value at a time, so a value means the same whatever else its file holds.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.prepare.times import MICROSECONDS, parse_durations, parse_instants
from pipeline.schema import UserError

MISSING: Final = ("", "null", r"\n", "nan", "<na>", "none", "nat")
"""Texts, in any case and without blanks at their ends, that mean "missing" in every column."""

NOT_AVAILABLE: Final = ("na", "n/a")
"""Further ones of patients and values; a variable may be named Na, which is sodium."""

END_OF_TIME: Final = datetime(9999, 1, 1)

_TICKS: Final = {"s": 1_000_000, "ms": 1_000, "us": 1}
_MAX_MICROSECONDS: Final = 1 << 62


def to_plain(path: Path, name: str, column: pa.ChunkedArray) -> pl.Series:
    """Return a column of Arrow as numbers, Boolean, String, ``Datetime("us")`` in UTC, ``Duration("us")`` or Null.

    Decimals become their digits, bytes the UTF-8 text that they are.  An instant too far away for 64 bits is null.
    Any other type, and bytes that are no text, are a UserError without a value in it.
    """
    column = _unwrap(column)
    kind = column.type
    try:
        if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
            dtype = pl.Datetime("us") if pa.types.is_timestamp(kind) else pl.Duration("us")
            return _to_microseconds(_series(column.cast(pa.int64())), kind.unit).cast(dtype).alias(name)
        if pa.types.is_date(kind):
            days = _series(column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()))
            return _to_microseconds(days.clip(-(10**8), 10**8) * 86_400, "s").cast(pl.Datetime("us")).alias(name)
        if pa.types.is_decimal(kind):
            text = _series(column.cast(pa.string()))
            return text.str.replace(r"^(.*\..*?)0+$", "${1}").str.strip_suffix(".").alias(name)
        if pa.types.is_fixed_size_binary(kind):  # padded, where the text is shorter
            text = _series(column.cast(pa.large_binary()).cast(pa.large_string()))
            return text.str.strip_chars_end("\0").alias(name)
        if _is_binary_or_text(kind):
            column = column.cast(pa.large_string())
            column.validate(full=True)  # Polars takes text on trust, and panics
        elif pa.types.is_float16(kind):
            column = column.cast(pa.float32())
        elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or kind in (pa.bool_(), pa.null())):
            raise UserError(f"{path}: column {name!r} holds {kind}; it must hold numbers, text or times")
    except pa.ArrowException:
        raise UserError(f"{path}: column {name!r} holds {kind} that is no UTF-8 text; write it as text") from None
    return _series(column).alias(name)


def _unwrap(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without dictionary, run-end or extension type around its values."""
    while True:
        kind = column.type
        if isinstance(kind, pa.UuidType):
            texts = [None if value is None else str(value) for value in column.to_pylist()]
            return pa.chunked_array([pa.array(texts, pa.large_string())])
        if isinstance(kind, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
        elif pa.types.is_dictionary(kind):
            column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], kind.value_type)
        elif pa.types.is_run_end_encoded(kind):
            column = pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], kind.value_type)
        else:
            return column


def _is_binary_or_text(kind: pa.DataType) -> bool:
    views = (pa.types.is_string_view, pa.types.is_binary_view)
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(fits(kind) for fits in (*plain, *views))


def _series(array: pa.ChunkedArray) -> pl.Series:
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series


def _to_microseconds(ticks: pl.Series, unit: str) -> pl.Series:
    """Return ticks of a unit as microseconds, rounded down; null where 64 bits do not hold them."""
    if unit == "ns":
        return ticks // 1000
    limit = _MAX_MICROSECONDS // _TICKS[unit]
    return ticks.set(~ticks.is_between(-limit, limit).fill_null(True), None) * _TICKS[unit]


class Kinds(NamedTuple):
    """The types that a column of some role may have after :func:`to_plain`, and those in words."""

    has_numbers: bool
    others: tuple[Any, ...]
    wanted: str


NAMES: Final = Kinds(True, (pl.String, pl.Null, pl.Boolean, pl.Enum), "numbers or text")
NUMBERS: Final = Kinds(True, (pl.String, pl.Null, pl.Boolean), "numbers or text")
MINUTES: Final = Kinds(
    True, (pl.String, pl.Null, pl.Duration), "numbers or durations; if it holds dates, use --time_column"
)
TIMES: Final = Kinds(
    False,
    (pl.Datetime, pl.Duration, pl.String, pl.Null),
    "dates or durations; if it holds numbers, say --time_unit hours, or --minute_column for minutes",
)
PREDICTION_TIMES: Final = Kinds(True, TIMES.others, "dates, durations or minutes")
DATES: Final = Kinds(False, (pl.Datetime, pl.String, pl.Null), "dates with time")


def check(path: Path, column: pl.Series, kinds: Kinds) -> pl.Series:
    """Return the column, if it is of one of the kinds; else raise UserError."""
    if not ((kinds.has_numbers and column.dtype.is_numeric()) or column.dtype in kinds.others):
        raise UserError(f"{path}: column {column.name!r} holds {column.dtype}; it must hold {kinds.wanted}")
    return column


def to_patient_names(values: pl.Series) -> pl.Series:
    """Return [N] ids as text: whole numbers without a fraction, no blanks at the ends; null = missing."""
    return _to_names(values, (*MISSING, *NOT_AVAILABLE))


def to_variable_names(values: pl.Series) -> pl.Series:
    """Return [N] names of variables as text, by the rule of patients, but that ``NA`` is a name."""
    return _to_names(values, MISSING)


def _to_names(values: pl.Series, missing: tuple[str, ...]) -> pl.Series:
    name = values.name
    if values.dtype.is_float():
        finite = values.set(~values.is_finite().fill_null(False), None)
        whole = [str(int(value)) if value is not None and value == int(value) else None for value in finite.to_list()]
        return pl.Series(name, whole, dtype=pl.String).fill_null(finite.cast(pl.String))
    text = values.cast(pl.String).str.strip_chars()
    if text.str.contains(".0", literal=True).any():
        text = text.str.replace(r"^([+-]?\d+)\.0+$", "${1}").str.replace(r"^-0+$", "0")
    return text.set(text.str.to_lowercase().is_in(missing).fill_null(False), None).alias(name)


def to_numbers(column: pl.Series) -> pl.Series:
    """Return float64: null where there is no number, NaN never, infinite where float64 cannot hold it."""
    if column.dtype != pl.String:
        return column.cast(pl.Float64, strict=False).fill_nan(None)
    number = column.cast(pl.Float64, strict=False).fill_nan(None)
    left = number.is_null() & column.is_not_null()
    if left.any():  # few have blanks at their ends
        text = column.filter(left).str.strip_chars()
        word = text.str.to_lowercase()
        stripped = text.cast(pl.Float64, strict=False).fill_nan(None)
        truth = pl.when(word == "true").then(1.0).when(word == "false").then(0.0).otherwise(stripped)
        number = number.scatter(left.arg_true(), pl.select(truth).to_series())
    return number


def is_missing(column: pl.Series) -> pl.Series:
    """Return [N] bool, whether a value is missing in its column's type: null, NaN, or a text that says so."""
    if column.dtype.is_float():
        return column.is_null() | column.is_nan().fill_null(False)
    if column.dtype != pl.String:
        return column.is_null()
    lower = column.str.strip_chars().str.to_lowercase()
    return column.is_null() | lower.is_in((*MISSING, *NOT_AVAILABLE)).fill_null(False)


def to_whole_numbers(column: pl.Series) -> pl.Series:
    """Return int64: null where there is no whole number that int64 holds."""
    if column.dtype.is_integer():
        return column.cast(pl.Int64, strict=False)
    number = to_numbers(column)
    whole = number.set(~(number == number.floor()).fill_null(False), None).cast(pl.Int64, strict=False)
    if column.dtype == pl.String:  # float64 loses digits of long ones
        digits = column.str.strip_chars().str.replace(r"\.0*$", "")
        whole = digits.cast(pl.Int64, strict=False).fill_null(whole)
    return whole


def to_minutes(column: pl.Series, minutes_of_unit: float = 1.0) -> pl.Series:
    """Return float64 minutes of numbers in a unit, of durations, and of texts of either; null where there are none."""
    if column.dtype == pl.Duration:
        return column.dt.total_microseconds() / MICROSECONDS
    minutes = to_numbers(column) * minutes_of_unit
    if column.dtype == pl.String and minutes.null_count():
        minutes = minutes.fill_null(_parse_distinct(column, minutes.is_null(), pl.Float64))
    return minutes


def to_instants(column: pl.Series) -> pl.Series:
    """Return ``Datetime("us")`` in UTC, of dates or of text with the year first (ISO 8601); null where there is none.

    The year stands first in all forms, so that no day passes for a month.  Each text is understood by itself.
    """
    if column.dtype != pl.String:
        return column.cast(pl.Datetime("us"))
    instants = column.set(column.str.len_bytes() != 19, None).str.to_datetime(
        "%Y-%m-%d %H:%M:%S", time_unit="us", strict=False
    )
    rest = instants.is_null() & column.is_not_null()
    return instants.fill_null(_parse_distinct(column, rest, pl.Datetime("us"))) if rest.any() else instants


def _parse_distinct(column: pl.Series, which: pl.Series, dtype: Any) -> pl.Series:
    """Return what the texts ``which`` mean, as dates or as minutes; each distinct text is looked at once."""
    distinct = column.filter(which).unique().drop_nulls()
    text = distinct.str.strip_chars()
    parsed = parse_instants(text) if dtype == pl.Datetime else parse_durations(text)
    found = parsed.is_not_null()
    if not found.any():
        return pl.repeat(None, len(column), dtype=dtype, eager=True)
    return column.replace_strict(distinct.filter(found), parsed.filter(found), default=None, return_dtype=dtype)


def describe_form(text: str) -> str:
    """Return the form of a text without its content: each digit as ``#``, each letter as ``a``, at most 30 of them."""
    return "".join("#" if sign.isdigit() else "a" if sign.isalpha() else sign for sign in text[:30])


def to_times(column: pl.Series, *, are_numbers_minutes: bool) -> pl.Series:
    """Return instants of a column of times, or float64 minutes where it holds durations (or numbers, if they may be).

    A column of text holds instants if one of its texts is one.
    """
    if column.dtype == pl.Duration or column.dtype.is_numeric():
        return to_minutes(column)
    instants = to_instants(column)
    if column.dtype != pl.String or instants.null_count() < len(column):
        return instants
    minutes = to_minutes(column) if are_numbers_minutes else _parse_distinct(column, column.is_not_null(), pl.Float64)
    return minutes if minutes.null_count() < len(minutes) else instants
