"""Read columns of input files without losing a row, and cut files into pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare import names
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE, UserError

FILE: Final = "file"  # uint32, number of the file within its piece
ROW: Final = "row"  # int64, data row of the file, from 1; header lines do not count
SPLIT: Final = "split"  # string, one of SPLITS

AS_TEXT: Final = pl.col(PATIENT_ID, MINUTE, VARIABLE, VALUE).cast(pl.String)
"""The columns that rejects show as text."""

MICROSECONDS: Final = 60e6
"""Microseconds of a minute."""

PIECE_BYTES: Final = 1 << 26
"""Approximate bytes of input in a piece: two or three million events, some hundred MiB while they are worked on."""

ROW_BYTES: Final = 24
"""Approximate bytes of a row of text."""

FEW_ROWS: Final = 1 << 14
"""Number of rows that are read faster without threads."""

UNREADABLE: Final = (OSError, UnicodeDecodeError, pa.ArrowException, pl.exceptions.PolarsError)
"""What reading a damaged file can raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A unit of input for one task: a few small files, or parts (row groups, bytes, synthetic patients) of one."""

    files: tuple[str, ...]  # names relative to the input, as rejects give them
    start: int = 0  # the first part
    stop: int = 0  # one past the last part; 0 where files are read whole
    first_row: int = 1  # number of the first data row of a range of bytes


@contextmanager
def reading(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Raise UserError, in one line, for what reading a damaged file raises, and for exceptions of type ``others``."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (*UNREADABLE, *others) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason}); give a whole, valid file, or leave it out") from None


def number_rows(columns: dict[str, pl.Series], *, file: int = 0, first: int = 1) -> pl.DataFrame:
    """Return the columns of one file with the columns ``file`` and ``row`` before them."""
    frame = pl.DataFrame(columns)
    row = pl.int_range(first, first + pl.len(), dtype=pl.Int64).alias(ROW)
    return frame.select(pl.lit(file, dtype=pl.UInt32).alias(FILE), row, *columns)


def to_plain_column(path: Path, name: str, column: pl.Series, *, instants: bool = False) -> pl.Series:
    """Return a column of numbers, text or (if ``instants``) dates; categories become text, all else is a UserError."""
    dtype = column.dtype
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return column.cast(pl.String)
    is_date = instants and dtype in (pl.Datetime, pl.Date)
    if dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null) or is_date:
        return column
    raise UserError(f"{path}: column {name!r} holds {dtype}; it must hold numbers or text, or dates as --time_column")


def to_utc(column: pl.Series) -> pl.Series:
    """Return dates, with or without time and zone, as ``Datetime("us")`` in UTC."""
    if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.Datetime("us"))


def to_patient_ids(column: pl.Series) -> pl.Series:
    """Return patient ids as text; whole numbers lose their fraction: ``200001.0`` is patient 200001."""
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        column = whole.cast(pl.String).zip_with((whole == column).fill_null(False), column.cast(pl.String))
    text = column.cast(pl.String)
    if text.str.ends_with(".0").any():
        text = text.str.replace(r"^([+-]?\d+)\.0$", "${1}")
    return text.alias(PATIENT_ID)


def group_files(sizes: Mapping[str, int]) -> list[Piece]:
    """Return pieces of whole files, about ``PIECE_BYTES`` each, in the order of ``sizes``, bytes by name."""
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > PIECE_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return [Piece(files=tuple(group)) for group in groups]


def cut_files(files: Mapping[str, Path]) -> list[Piece]:
    """Return pieces of files by their names: small files together, large Parquet files by row groups.

    Parquet is counted by its rows: packed, they may take a byte each or fifty.
    """
    whole: dict[str, int] = {}
    parts: list[Piece] = []
    for name, path in files.items():
        with reading(path):
            metadata = pq.read_metadata(path) if path.suffix == ".parquet" else None
        num_bytes = metadata.num_rows * ROW_BYTES if metadata else path.stat().st_size
        if metadata is None or num_bytes <= PIECE_BYTES:
            whole[name] = num_bytes
            continue
        start = num_bytes = 0
        for group in range(metadata.num_row_groups):
            num_bytes += metadata.row_group(group).num_rows * ROW_BYTES
            if num_bytes >= PIECE_BYTES or group + 1 == metadata.num_row_groups:
                parts.append(Piece(files=(name,), start=start, stop=group + 1))
                start, num_bytes = group + 1, 0
    return group_files(whole) + parts


def pick_column(path: Path, columns: Iterable[str], wanted: str | None, known: Sequence[str], flag: str) -> str:
    """Return the column that a flag names, or the first of the ``known`` names that the file has.

    Raises:
        UserError: there is none, or more than one of that name.
    """
    columns = list(columns)
    for name in [wanted] if wanted is not None else known:
        if name in columns:
            if columns.count(name) > 1 or f"{name}_duplicated_0" in columns:  # as Polars renames the second
                raise UserError(f"{path}: column {name!r} is there more than once; keep one")
            return name
    missing = repr(wanted) if wanted is not None else " or ".join(map(repr, known))
    raise UserError(f"{path}: no column {missing}; name one of {', '.join(map(repr, columns))} with {flag}")


def read_parquet(
    path: Path, piece: Piece, columns: Sequence[str], optional: Sequence[str] = (), name_columns: Sequence[str] = ()
) -> tuple[pl.DataFrame, int]:
    """Return columns of one Parquet file of a piece, and the number of its first row, from 1.

    Args:
        path: the file.
        piece: says which row groups.
        columns: which columns; one that is missing is a UserError, as is a file that cannot be read.
        optional: further columns, read if they are there.
        name_columns: columns of repeated texts, read as names (``pipeline.prepare.names``) in a sixth of the time.
    """
    with reading(path, KeyError):  # a column of names that is nested
        file = pq.ParquetFile(path)
        metadata, present = file.metadata, file.schema_arrow.names
        wanted = [pick_column(path, present, name, (), f"a header {','.join(columns)}") for name in columns]
        wanted += [name for name in optional if name in present]
        groups = range(piece.start, piece.stop or metadata.num_row_groups)
        num_before = sum(metadata.row_group(group).num_rows for group in range(piece.start))
        if name_columns:
            file = pq.ParquetFile(path, metadata=metadata, read_dictionary=name_columns)
        table = file.read_row_groups(groups, wanted, use_threads=metadata.num_rows > FEW_ROWS)
        encoded = [name for name in name_columns if pa.types.is_dictionary(table.schema.field(name).type)]
        series = [names.from_dictionary(name, table[name]) for name in encoded]
        return _to_frame(table.drop_columns(encoded)).hstack(series), 1 + num_before


def concat_files(top: Path, piece: Piece, frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Join the rows of a piece's files below ``top``; raise UserError where columns or dtypes differ."""
    columns = [frame.columns[2:] for frame in frames]  # without file and row
    for name, present in zip(piece.files, columns, strict=True):
        if present != columns[0]:
            odd = min(set(present) ^ set(columns[0]))
            held = f"holds {', '.join(present)}, {piece.files[0]} {', '.join(columns[0])}"
            raise UserError(f"{top / name}: {held}; {odd!r} is in some files only: prepare alike files together")
    try:
        return pl.concat(frames, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{top}: {piece.files[0]} and others differ in dtype ({error}); make them alike") from None


def _to_frame(table: pa.Table) -> pl.DataFrame:
    """Return the columns without metadata, after checking their text: Polars takes both on trust, and panics."""
    table.validate(full=True)
    frame = pl.from_arrow(pa.Table.from_arrays(table.columns, names=table.column_names))
    assert isinstance(frame, pl.DataFrame)
    return frame
