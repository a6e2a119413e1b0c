"""Read the files that are neither events nor labels: statistics, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare.columns import to_variable_names
from pipeline.prepare.sources.csv_files import UTF8, Dialect, parse_rows, read_header, read_parts
from pipeline.prepare.sources.listing import is_parquet, list_tables
from pipeline.prepare.sources.reading import Piece, pick_column, read_parquet, reading
from pipeline.schema import FIRST_CODE, VARIABLE, UserError

T = TypeVar("T")


def read_frame(
    path: Path, needed: Sequence[str] = (), header: str | None = None, dialect: Dialect = UTF8
) -> pl.DataFrame:
    """Return a whole CSV file (every column as text) or Parquet file (columns of the types of ``columns.to_plain``).

    One that has not all ``needed`` columns is a UserError that shows the ``header`` that it should have.
    """
    frame = _read_columns(path) if is_parquet(path) else _read_texts(path, dialect)
    for name in needed:
        pick_column(path, frame.columns, name, (), f"a header {header or ','.join(needed)}")
    return frame


def _read_columns(path: Path) -> pl.DataFrame:
    """Return the columns of a Parquet file that hold numbers, text or times; lists are of no use in a side file."""
    with reading(path):
        file = pq.ParquetFile(path)
        is_nested = {field.name: pa.types.is_nested(field.type) for field in file.schema_arrow}
    return read_parquet(path, Piece(files=(path.name,)), [name for name, nested in is_nested.items() if not nested])[0]


def _read_texts(path: Path, dialect: Dialect) -> pl.DataFrame:
    """Return the rows of a CSV file; the second column of a name gets another one, as Polars gives it."""
    header = read_header(path, dialect)
    names = [name if name not in header[:at] else f"{name}_duplicated_0" for at, name in enumerate(header)]
    wanted, separator = list(dict.fromkeys(names)), dialect.separator_of(path)
    parts = read_parts(path, Piece(files=(path.name,)), dialect)
    frames = [parse_rows(path, text, row, names, wanted, separator) for text, row in parts]
    return pl.concat(frames) if frames else pl.DataFrame(schema=dict.fromkeys(wanted, pl.String))


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
