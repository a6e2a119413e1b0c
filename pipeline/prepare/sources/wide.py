"""Turn wide rows, a column a variable, into events, a row an event."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import polars as pl

from pipeline.prepare.columns import is_missing
from pipeline.schema import VALUE, VARIABLE

PREFIX: Final = "variable:"
"""Stands before the names of the columns of variables, so that none is taken for one of another role."""

MAX_CELLS: Final = 1 << 23
"""Maximum number of cells that become events at once."""


def list_wide_columns(frame: pl.DataFrame) -> list[str]:
    return [name for name in frame.columns if name.startswith(PREFIX)]


def melt(rows: pl.DataFrame) -> Iterator[tuple[pl.DataFrame, int]]:
    """Yield events of bounded numbers of wide rows, and how many wide rows were new in them.

    A cell that is missing in its column's type is no event; a row of such cells alone is part of a grid.  Columns of
    numbers and of texts come apart; columns of times are no variables.
    """
    wide = list_wide_columns(rows)
    step = max(1, MAX_CELLS // max(1, len(wide)))
    numeric = [name for name in wide if rows.schema[name].is_numeric() or rows.schema[name] in (pl.Boolean, pl.Null)]
    texts = [name for name in wide if rows.schema[name] == pl.String]
    for start in range(0, max(1, rows.height), step):
        part = rows.slice(start, step)
        yield _melt_columns(part, wide, numeric, pl.Float64), part.height
        if texts:
            yield _melt_columns(part, wide, texts, pl.String), 0


def _melt_columns(
    rows: pl.DataFrame, wide: Sequence[str], columns: Sequence[str], dtype: type[pl.DataType]
) -> pl.DataFrame:
    """Return the other columns, ``variable`` and ``value`` of the cells of ``columns`` that are not missing."""
    present = [(~is_missing(rows[name])).arg_true() for name in columns]
    names = [name.removeprefix(PREFIX) for name in columns]
    row = pl.concat(present) if present else pl.Series([], dtype=pl.UInt32)
    code = np.repeat(np.arange(len(names), dtype=np.uint32), [len(index) for index in present])
    cells = [rows[name].gather(index).cast(dtype).alias(VALUE) for name, index in zip(columns, present, strict=True)]
    value = pl.concat(cells) if cells else pl.Series(VALUE, [], dtype=dtype)
    variable = pl.Series(names, dtype=pl.String).cast(pl.Enum(names)).gather(code).alias(VARIABLE)
    others = rows.drop(wide)
    return others[row.to_numpy()].with_columns(variable, value)
