"""Read columns of input files without losing a row, and cut files into pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare import names
from pipeline.prepare.columns import to_plain
from pipeline.prepare.sources.listing import is_parquet
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE, UserError

FILE: Final = "file"  # uint32, number of the file within its piece
ROW: Final = "row"  # int64, data row of the file, from 1; header lines do not count
SPLIT: Final = "split"  # string, one of SPLITS
SITE: Final = "site"  # of names, null = missing: where a row is from, such as a hospital

ID_COLUMNS: Final = ("patient_id", "ts_id", "stay_id", "icustay_id", "RecordID", "subject_id", "person_id")
"""Usual names of the column of the patient; the first that is there serves."""

PIECE_BYTES: Final = 1 << 26
"""Approximate bytes of input in a piece: two or three million events, some hundred MiB while they are worked on."""

ROW_BYTES: Final = 24
"""Approximate bytes of a row of text."""

CELL_BYTES: Final = 2
"""Approximate bytes of a cell of a wide row, most of which are empty."""

READ_BYTES: Final = 1 << 20
"""Bytes of a column of Parquet that are read at once, where a file is read in batches."""

FEW_ROWS: Final = 1 << 14
"""Number of rows that are read faster without threads."""

UNREADABLE: Final = (OSError, UnicodeDecodeError, pa.ArrowException, pl.exceptions.PolarsError)
"""What reading a damaged file can raise."""


def as_text(rows: pl.DataFrame) -> list[pl.Expr]:
    """Return patient, minute, variable and value as text; of durations that is ISO 8601, for Polars casts none."""
    return [
        pl.col(name).dt.to_string("iso") if rows.schema[name] == pl.Duration else pl.col(name).cast(pl.String)
        for name in (PATIENT_ID, MINUTE, VARIABLE, VALUE)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A unit of input for one task: a few small files, or parts (row groups, bytes, synthetic patients) of one."""

    files: tuple[str, ...]  # names relative to the input, as rejects give them
    start: int = 0  # the first part
    stop: int = 0  # one past the last part; 0 where files are read whole
    first_row: int = 1  # number of the first data row of a range of bytes
    max_rows: int | None = None  # of a Parquet file, of which the beginning is read as a sample


@contextmanager
def reading(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Raise UserError, in one line, for what reading a damaged file raises, and for exceptions of type ``others``."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except (*UNREADABLE, *others) as error:
        raise UserError(
            f"{path}: cannot be read ({say_why(error)}); give a whole, valid file, or leave it out"
        ) from None


def say_why(error: Exception) -> str:
    """Return the reason of an error without what it may quote of a file's rows."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is no {error.encoding.upper()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pl.exceptions.PolarsError):
        return "its rows do not fit its header"
    return (str(error).splitlines() or [type(error).__name__])[0]


def number_rows(columns: dict[str, pl.Series], *, file: int = 0, first: int = 1) -> pl.DataFrame:
    """Return the columns of one file with the columns ``file`` and ``row`` before them."""
    frame = pl.DataFrame(columns)
    row = pl.int_range(first, first + pl.len(), dtype=pl.Int64).alias(ROW)
    return frame.select(pl.lit(file, dtype=pl.UInt32).alias(FILE), row, *columns)


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
            metadata = pq.read_metadata(path) if is_parquet(path) else None
        row_bytes = max(ROW_BYTES, CELL_BYTES * metadata.num_columns) if metadata else 0
        num_bytes = metadata.num_rows * row_bytes if metadata else path.stat().st_size
        if metadata is None or num_bytes <= PIECE_BYTES:
            whole[name] = num_bytes
            continue
        start = num_bytes = 0
        for group in range(metadata.num_row_groups):
            num_bytes += metadata.row_group(group).num_rows * row_bytes
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
    lower = [name.lower() for name in columns]
    for name in [wanted] if wanted is not None else known:
        if wanted is None and name not in columns and name.lower() in lower:
            name = columns[lower.index(name.lower())]
        if name in columns:
            if columns.count(name) > 1 or f"{name}_duplicated_0" in columns:  # as Polars renames the second
                raise UserError(f"{path}: column {name!r} is there more than once; keep one")
            return name
    missing = repr(wanted) if wanted is not None else " or ".join(map(repr, known))
    hint = "; if it has several, say --separator" if len(columns) == 1 else ""
    raise UserError(f"{path}: no column {missing}; name one of {', '.join(map(repr, columns))} with {flag}{hint}")


def read_column_names(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file."""
    with reading(path):
        return list(pq.read_schema(path).names)


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
        # Legacy instants of 96 bits would overflow as nanoseconds.
        file = pq.ParquetFile(path, coerce_int96_timestamp_unit="us")
        metadata, present = file.metadata, file.schema_arrow.names
        wanted = [pick_column(path, present, name, (), f"a header {','.join(columns)}") for name in columns]
        wanted += [name for name in optional if name in present]
        groups = range(piece.start, piece.stop or metadata.num_row_groups)
        num_before = sum(metadata.row_group(group).num_rows for group in range(piece.start))
        encoded = [name for name in name_columns if name in present and _is_text(file.schema_arrow.field(name).type)]
        if encoded:
            file = pq.ParquetFile(path, metadata=metadata, read_dictionary=encoded, coerce_int96_timestamp_unit="us")
        if piece.max_rows is None:
            table = file.read_row_groups(groups, wanted, use_threads=metadata.num_rows > FEW_ROWS)
        else:
            first = list(islice(file.iter_batches(piece.max_rows, columns=wanted), 1))
            table = pa.Table.from_batches(first, None if first else file.schema_arrow).select(wanted)
        series = [_to_names(path, name, table[name]) for name in encoded]
        return _to_frame(path, table.drop_columns(encoded)).hstack(series), 1 + num_before


def _to_names(path: Path, name: str, column: pa.ChunkedArray) -> pl.Series:
    try:
        return names.from_dictionary(name, column)
    except pa.ArrowInvalid:
        return names.encode(to_plain(path, name, column))  # which says what is wrong


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def read_batches(path: Path, columns: Sequence[str], max_rows: int) -> Iterator[pl.DataFrame]:
    """Yield columns of a Parquet file, at most ``max_rows`` rows at a time; at least one frame."""
    with reading(path):
        # A buffer, or a column of a row group would be in memory as a whole.
        file = pq.ParquetFile(path, coerce_int96_timestamp_unit="us", buffer_size=READ_BYTES)
        batches = file.iter_batches(max_rows, columns=list(columns))
        if file.metadata.num_rows == 0:
            yield _to_frame(path, file.schema_arrow.empty_table().select(columns))
        for batch in batches:
            yield _to_frame(path, pa.Table.from_batches([batch]).select(columns))


def concat_alike(frames: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
    """Join the rows of files whose columns have the same types; others stay apart, so that no type changes another's.

    Columns of names have the type of their own names; they are joined as names, with texts too.
    """
    groups: dict[tuple[tuple[str, str], ...], list[pl.DataFrame]] = {}
    for frame in frames:
        kinds = tuple((name, str(pl.String if dtype == pl.Enum else dtype)) for name, dtype in frame.schema.items())
        groups.setdefault(kinds, []).append(frame)
    return [_concat(group) for group in groups.values()]


def _concat(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    if len(frames) == 1:
        return frames[0]
    order = frames[0].columns
    named = [name for name in order if any(frame.schema[name] == pl.Enum for frame in frames)]
    joined = [names.concat([names.encode(frame[name]) for frame in frames]) for name in named]
    return pl.concat([frame.drop(named) for frame in frames]).with_columns(joined).select(order)


def _to_frame(path: Path, table: pa.Table) -> pl.DataFrame:
    """Return the columns as plain ones, after checking the file's claims, which Polars takes on trust."""
    table.validate(full=True)
    columns = zip(table.column_names, table.columns, strict=True)
    return pl.DataFrame([to_plain(path, name, column) for name, column in columns])
