"""Read the files that are neither events nor labels: statistics, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare.columns import to_variable_names
from pipeline.prepare.sources.csv_files import UTF8, Dialect, read_header, read_parts
from pipeline.prepare.sources.csv_rows import parse_rows
from pipeline.prepare.sources.listing import is_parquet, list_tables
from pipeline.prepare.sources.reading import Piece, pick_column, read_batches, read_column_names, reading
from pipeline.schema import FIRST_CODE, VARIABLE, UserError

T = TypeVar("T")

BATCH_ROWS: Final = 1 << 18
"""Maximum number of rows of a Parquet file that are read at once."""


def read_frame(
    path: Path, needed: Sequence[str] = (), header: str | None = None, dialect: Dialect = UTF8
) -> pl.DataFrame:
    """Return a whole CSV file (every column as text) or Parquet file (columns of the types of ``columns.to_plain``).

    One that has not all ``needed`` columns is a UserError that shows the ``header`` that it should have.
    """
    frame = pl.concat(read_frames(path, list(dict.fromkeys(read_column_titles(path, dialect))), dialect))
    for name in needed:
        pick_column(path, frame.columns, name, (), f"a header {header or ','.join(needed)}")
    return frame


def read_column_titles(path: Path, dialect: Dialect = UTF8) -> list[str]:
    """Return the names of columns; of Parquet those that hold numbers, text or times, for a side file needs no lists.

    The second column of a name in a CSV file gets another one, as Polars gives it.
    """
    if is_parquet(path):
        with reading(path):
            schema = pq.read_schema(path)
        return [field.name for field in schema if not pa.types.is_nested(field.type)]
    header = read_header(path, dialect)
    return [name if name not in header[:at] else f"{name}_duplicated_0" for at, name in enumerate(header)]


def read_frames(path: Path, columns: Sequence[str], dialect: Dialect = UTF8) -> Iterator[pl.DataFrame]:
    """Yield columns of a CSV file (as text) or Parquet file in parts of bounded size; at least one frame.

    A name that a Parquet file has twice is a UserError.
    """
    if is_parquet(path):
        present = read_column_names(path)
        for name in columns:
            pick_column(path, present, name, (), "another name")
        yield from read_batches(path, columns, BATCH_ROWS)
        return
    titles, separator = read_column_titles(path, dialect), dialect.separator_of(path)
    num_parts = 0
    for text, row in read_parts(path, Piece(files=(path.name,)), dialect):
        num_parts += 1
        yield parse_rows(path, text, row, titles, columns, separator)
    if not num_parts:
        yield pl.DataFrame(schema=dict.fromkeys(columns, pl.String))


def read_once(read: Callable[..., T], path: Path, *options: Any) -> T:
    """Return ``read(path, *options)`` of a file or of the tables of a folder.

    A process reads them once, as long as they stay as they are, whatever the number of pieces that need them.
    """
    with reading(path):
        stats = [file.stat() for file in list_tables(path)]
    found: T = _read_once(read, path, options, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))
    return found


@lru_cache(maxsize=4)
def _read_once(read: Callable[..., T], path: Path, options: tuple[Any, ...], files: tuple[Any, ...]) -> T:
    del files  # of another size or time, they are read again
    return read(path, *options)


def read_keyed_frame(
    path: Path, columns: Sequence[str], header: str, keys: Sequence[str] | None = None
) -> pl.DataFrame:
    """Return a file whose ``keys``, else the first of the needed ``columns``, name each row.

    Keys become names of variables by the rule of that column; one that repeats is a UserError.
    """
    names = list(keys or columns[:1])
    frame = read_frame(path, columns, header)
    frame = frame.with_columns(to_variable_names(frame[name]) for name in names)
    joined = frame.select(pl.concat_str(names, separator="=", ignore_nulls=True)).to_series()
    repeated = joined.filter(joined.is_duplicated())
    if len(repeated):
        raise UserError(f"{path}: {repeated[0]!r} stands there {(joined == repeated[0]).sum()} times; keep one row")
    return frame


def read_statistics(path: Path) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation by variable, from a CSV of ``variable``, ``mean``, ``std``.

    A std of 0 or none is 1; a variable without a mean is left out.
    """
    frame = read_keyed_frame(path, (VARIABLE, "mean", "std"), "variable,mean,std")
    numbers = frame.select(VARIABLE, pl.col("mean", "std").cast(pl.Float64, strict=False))
    return {
        variable: (mean, std if std is not None and math.isfinite(std) and std > 0 else 1.0)
        for variable, mean, std in numbers.filter(pl.col("mean").is_finite()).iter_rows()
    }


def read_embeddings(path: Path, variables: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return [num_codes, D] the vectors of the vocabulary's ``variables``, from a CSV of ``Key`` and D numbers.

    Those of padding and unknown, the first two variables, are zeros.
    """
    frame = read_keyed_frame(path, ("Key",), "Key,0,1,2 …")
    if frame.width == 1:
        raise UserError(f"{path}: no numbers beside the keys; add a column for each dimension")
    row_of = {name: row for row, name in enumerate(frame["Key"])}
    wanted = variables[FIRST_CODE:]
    missing = [variable for variable in wanted if variable not in row_of]
    if missing:
        raise UserError(f"{path}: no vector for variable {missing[0]!r} ({len(missing)} lack one); add a row for each")
    vectors = frame[[row_of[variable] for variable in wanted]].drop("Key").cast(pl.Float32, strict=False).to_numpy()
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise UserError(f"{path}: the vector of variable {wanted[broken[0]]!r} is not all finite numbers; mend the row")
    return np.concatenate([np.zeros((FIRST_CODE, vectors.shape[1]), np.float32), vectors])
