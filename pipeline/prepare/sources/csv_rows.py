"""Parse rows of a CSV file: columns of text, or of numbers where all of their texts are some."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import polars as pl

from pipeline.schema import UserError

ADVICE: Final = "if rows have another form, say --separator, --encoding or --decimal_comma"


def parse_numbers(
    content: bytes, names: Sequence[str], columns: Sequence[str], numbers: Collection[str], separator: str
) -> pl.DataFrame | None:
    """Return columns of rows, of which ``numbers`` are float64 and null where a field is empty.

    They are what the texts of :func:`parse_rows` mean.  None where one means no number, or NaN, or rows are broken.
    """
    try:
        frame = _parse(content, names, columns, separator, numbers)
    except pl.exceptions.PolarsError:
        return None
    return None if any(frame[name].is_nan().any() for name in numbers) else frame


def parse_rows(
    path: Path, content: bytes, first_row: int, names: Sequence[str], columns: Sequence[str], separator: str
) -> pl.DataFrame:
    """Return columns of rows as text; null where a field is empty.

    Args:
        path: names the file in an error.
        content: the rows, without a header.
        first_row: the number of the first one.
        names: the header of the file.
        columns: those of them that are read.
        separator: what stands between fields.
    """
    try:
        return _parse(content, names, columns, separator)
    except pl.exceptions.PolarsError:
        problem = _find_broken_row(content, first_row, len(names), separator)
        raise UserError(f"{path}: cannot be read ({problem}); mend the row; {ADVICE}") from None


def _parse(
    content: bytes, names: Sequence[str], columns: Sequence[str], separator: str, numbers: Collection[str] = ()
) -> pl.DataFrame:
    position = {str(names.index(column)): column for column in columns}
    header = separator.join(map(str, range(len(names)))).encode() + b"\n"
    frame = pl.read_csv(
        header + content,
        columns=list(position),
        infer_schema=False,
        schema_overrides={str(names.index(name)): pl.Float64 for name in numbers},
        separator=separator,
    )
    return frame.rename(position).select(columns)


def _find_broken_row(content: bytes, first_row: int, num_columns: int, separator: str) -> str:
    """Return which row does not fit the header, and why, without quoting it."""
    rows = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=separator, strict=True)
    number = first_row
    try:
        for number, row in enumerate(rows, start=first_row):
            if len(row) > num_columns:
                return f"row {number} has {len(row)} fields, the header {num_columns}"
            number += 1
    except csv.Error:
        pass
    return f"row {number} opens a quote that is not closed as CSV closes it"
