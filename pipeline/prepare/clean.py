"""Turn rows as they came into canonical rows that are kept, and rejected rows with a reason.

Every row goes to exactly one of the two.  No row is an error: a row that cannot be used is a reject.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import polars as pl
import pyarrow as pa

from pipeline.prepare import columns, names
from pipeline.prepare.sources.reading import FILE, ROW, SITE, as_text
from pipeline.prepare.sources.source import RawRows
from pipeline.schema import FLOAT32_MAX, MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE

END_OF_TIME: Final = "end_of_time"
"""An instant that stands for "open", as databases write it (9999-12-31)."""

DUPLICATE: Final = "duplicate"
NO_ORIGIN: Final = "no_origin"
"""Reasons that pipeline.prepare.sort finds, because they need all rows of a patient together."""

RESERVED_VARIABLES: Final = ("<padding>", "<unknown>")
"""Names of the first two rows of the vocabulary, which no variable may have."""

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
    number, and where the input has them ``set_index`` int64 and ``site`` as ``pipeline.prepare.names``.
    """
    rows = raw.rows
    set_columns = [SET_INDEX] if SET_INDEX in rows.columns else []
    patient = names.encode(rows[PATIENT_ID], columns.to_patient_names)
    variable = names.encode(rows[VARIABLE], columns.to_variable_names)
    number = columns.to_numbers(rows[VALUE])
    is_bad = _is_bad_value(rows[VALUE], number)
    if (raw.categories or raw.text_events) and is_bad.any():
        variable, number, is_bad = _apply_categories(raw, variable, number, is_bad)
    set_index = [columns.to_whole_numbers(rows[name]).alias(name) for name in set_columns]
    minute = columns.to_minutes(rows[MINUTE]).alias(MINUTE) if raw.minute is None else raw.minute.alias(MINUTE)
    value = number.cast(pl.Float32).alias(VALUE)
    site = [names.encode(rows[SITE], columns.to_patient_names)] if SITE in rows.columns else []
    typed = rows.select(FILE, ROW, patient, minute, variable, value, *set_index, *site)
    time = pl.col(MINUTE)
    instants, outside = typed.schema[MINUTE].is_temporal(), ~(time.abs() <= FLOAT32_MAX).fill_null(False)
    untimed = time.is_null() if instants else outside
    rules: dict[str, pl.Expr | pl.Series] = {
        "no_patient": patient.is_null(),
        "no_variable": variable.is_null(),
        "reserved_variable": names.test(variable, lambda name: name.is_in(RESERVED_VARIABLES)).fill_null(False),
        **({END_OF_TIME: (time >= columns.END_OF_TIME).fill_null(False)} if instants else {}),
        "bad_minute": untimed & (not raw.static),
        "bad_value": is_bad,
        "infinite_value": value.is_infinite().fill_null(False),
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
    rejected = rows.filter(first.is_not_null())
    if raw.read_texts and rejected.height:
        rejected = raw.read_texts(rejected)
    return kept, rejected.select(reason, FILE, ROW, *as_text(rejected))


def _is_bad_value(column: pl.Series, number: pl.Series) -> pl.Series:
    """Return [N] bool, whether a value is there and no number."""
    left = number.is_null() & column.is_not_null()
    if not left.any():
        return left
    return left.scatter(left.arg_true(), ~columns.is_missing(column.filter(left)))


def _apply_categories(
    raw: RawRows, variable: pl.Series, number: pl.Series, is_text: pl.Series
) -> tuple[pl.Series, pl.Series, pl.Series]:
    """Return variables, numbers and bad values where a text is the category that a variable has.

    It becomes the number that the input's categories give ``variable=text``; or, with ``text_events``, an event of a
    variable of that name, without a number.
    """
    rows = is_text.arg_true()
    word = raw.rows[VALUE].gather(rows).str.strip_chars()
    category = pl.select(pl.format("{}={}", variable.gather(rows).cast(pl.String), word)).to_series()
    numbers = raw.categories
    mapped = category.replace_strict(list(numbers), list(numbers.values()), default=None, return_dtype=pl.Float64)
    number = number.scatter(rows, mapped)
    is_text = is_text.scatter(rows, mapped.is_null())
    if not raw.text_events:
        return variable, number, is_text
    named = mapped.is_null() & category.is_not_null()
    joined = names.concat([variable, names.encode(category.filter(named))])
    order = pl.int_range(len(variable), eager=True, dtype=pl.Int64)
    order = order.scatter(rows.filter(named), pl.int_range(len(variable), len(joined), eager=True, dtype=pl.Int64))
    return joined.gather(order).rename(VARIABLE), number, pl.repeat(False, len(variable), eager=True)


def _without_negative_zero(name: str) -> pl.Expr:
    """Return the column with 0.0 for -0.0: rows that differ in it alone are duplicates."""
    column = pl.col(name)
    zero_or_column = pl.when(column == 0).then(pl.lit(0.0)).otherwise(column)
    return zero_or_column.cast(pl.Float32 if name == VALUE else pl.Float64).alias(name)


def describe_reasons(rejects: Counter[str], examples: Mapping[str, str]) -> str:
    """Return reasons to reject with their counts, and the columns and forms that are examples of them."""
    return "; ".join(
        f"{reason} {number:,}" + (f" ({examples[reason]})" if reason in examples else "")
        for reason, number in rejects.most_common()
    )


def describe_rejects(rejected: pl.DataFrame, headers: Mapping[str, str]) -> dict[str, str]:
    """Return by reason the column at fault, and the form of its first value without content."""
    at_fault = {"bad_minute": MINUTE, "end_of_time": MINUTE, "bad_value": VALUE, "infinite_value": VALUE}
    first = rejected.filter(pl.col("reason").is_in(list(at_fault))).unique("reason", keep="first", maintain_order=True)
    return {
        row["reason"]: f"column {headers.get(name, name)!r}, as in {columns.describe_form(row[name] or '')!r}"
        for row in first.iter_rows(named=True)
        for name in [at_fault[row["reason"]]]
    }
