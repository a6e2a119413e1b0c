"""Store columns of names, such as patients and variables, as positions among the few distinct names.

A table of events has millions of rows and thousands of names.  What is asked of a name (is it blank? is it a whole
number with a fraction?) is asked once a name, and its answer gathered for the rows.  Such a column is a Polars
``Enum``, whose categories are this column's own: no table of texts grows from piece to piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import UserError

SHORT_RUN: Final = 4
"""Mean number of rows with one name after another up to which each row is looked up."""


def _as_text(values: pl.Series) -> pl.Series:
    return values.cast(pl.String)


def encode(column: pl.Series, as_text: Callable[[pl.Series], pl.Series] = _as_text) -> pl.Series:
    """Return a column of numbers or texts [E] as names; null stays null, values of equal texts are one name."""
    if isinstance(column.dtype, pl.Enum):
        return _gather(column.name, as_text(_names(column)), column.to_physical())
    if column.dtype == pl.Null:
        column = column.cast(pl.String)
    starts = _find_runs(column) if column.dtype == pl.String else None
    texts = column if starts is None else column.gather(starts)
    encoded = pc.dictionary_encode(texts.to_arrow(compat_level=pl.CompatLevel.newest()))  # of texts nothing is copied
    named = _gather(column.name, as_text(_series(encoded.dictionary)), _series(encoded.indices))
    if starts is None:
        return named
    return named.gather(np.repeat(np.arange(len(starts), dtype=np.uint32), np.diff(starts, append=len(column))))


def _find_runs(column: pl.Series) -> npt.NDArray[np.int64] | None:
    """Return where runs of equal texts start, such as a patient's rows; None where they are short."""
    size = max(0, len(column) - 1)
    starts = np.flatnonzero(np.append(len(column) > 0, column.slice(1).ne_missing(column.slice(0, size)).to_numpy()))
    return starts if len(starts) * SHORT_RUN < len(column) else None


def from_dictionary(name: str, chunks: pa.ChunkedArray) -> pl.Series:
    """Return a dictionary column of strings, as Parquet reads it, as names; ArrowInvalid where one is no text."""
    encoded = pa.chunked_array(chunks.chunks, chunks.type).unify_dictionaries().combine_chunks()
    texts = encoded.dictionary.cast(pa.large_string())
    texts.validate(full=True)
    return _gather(name, _series(texts), _series(encoded.indices))


def concat(parts: Sequence[pl.Series]) -> pl.Series:
    """Join columns of names, one after the other."""
    joined = pl.Enum(pl.concat([_names(part) for part in parts]).unique(maintain_order=True))
    return pl.concat([_names(part).cast(joined).gather(part.to_physical()) for part in parts]).rename(parts[0].name)


def nothing(name: str, num_rows: int) -> pl.Series:
    """Return a column of names that are all missing."""
    return pl.repeat(None, num_rows, dtype=pl.Enum([]), eager=True).alias(name)


def list_present(column: pl.Series) -> list[str]:
    """Return the names that a column has."""
    distinct, positions = _names(column), column.to_physical().drop_nulls()
    is_there = np.bincount(positions.to_numpy(), minlength=len(distinct)) > 0
    return distinct.filter(pl.Series(is_there)).to_list()


def test(column: pl.Series, predicate: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Return [E] bool, whether ``predicate`` holds for the row's name; null where there is none."""
    return predicate(_names(column)).gather(column.to_physical())


def find_expressions(texts: pl.Series, expressions: Sequence[str]) -> pl.Series:
    """Return [N] bool, whether one of the regular expressions of ``--exclude_codes`` is found in a text."""
    found = pl.repeat(False, len(texts), eager=True)
    for expression in expressions:
        try:
            found |= texts.str.contains(expression).fill_null(False)
        except pl.exceptions.ComputeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--exclude_codes {expression}: no regular expression ({reason}); mend it") from None
    return found


def _names(column: pl.Series) -> pl.Series:
    assert isinstance(column.dtype, pl.Enum)
    return column.dtype.categories.cast(pl.String)


def _gather(name: str, texts: pl.Series, position: pl.Series) -> pl.Series:
    """Return the text at ``position`` for each row; texts may repeat, and be null."""
    distinct = texts.drop_nulls().unique(maintain_order=True)
    return texts.cast(pl.Enum(distinct)).gather(position).rename(name)


def _series(array: pa.Array) -> pl.Series:
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series
