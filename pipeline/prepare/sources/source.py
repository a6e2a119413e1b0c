"""What an input format gives: pieces to read in any order, their rows as they came, labels and splits."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare import names
from pipeline.schema import PATIENT_ID, SPLITS, UserError

FILE: Final = "file"  # uint32, which of the piece's files
ROW: Final = "row"  # int64, data row of the file from 1; header lines do not count
LABEL: Final = "label"  # int8: 0, 1, or null = unlabelled
SPLIT: Final = "split"  # string, one of SPLITS
SUBJECT: Final = "subject"  # string, who a patient is, where one is several patients

MICROSECONDS: Final = 60e6
"""Of a minute."""

PIECE_BYTES: Final = 1 << 26
"""About how much input a piece holds: two or three million events, some hundred MiB while they are worked on."""

UNREADABLE: Final = (OSError, UnicodeDecodeError, pa.ArrowException, pl.exceptions.PolarsError)
"""What a damaged file can raise when it is read."""

ROW_BYTES: Final = 24
"""Of a row of text, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one task reads: some small files, or a part of a large one.

    Attributes:
        files: names relative to the input, as rejects give them.
        start: first of the file's parts (row groups, bytes, or patients made up); 0 where files are read whole.
        stop: one past the last.
        first_row: number of the first data row of a range of bytes.
    """

    files: tuple[str, ...]
    start: int = 0
    stop: int = 0
    first_row: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRows:
    """The rows of a piece, none left out.

    Attributes:
        rows: ``file``, ``row``, then ``patient_id``, ``minute``, ``variable``, ``value`` and perhaps ``set_index`` in
            whatever dtype they came; other columns serve the expressions below.
        minute: makes of them minutes (float64), or instants (``Datetime("us")``) that become minutes from the patient's
            origin; null or not finite = cannot be used.  None where ``minute`` holds plain numbers.
        static: an event without an instant belongs to the patient's static set, and can be used.
        rules: reasons to reject that only this format knows, tried first and in this order.
        patients: patients that the input names besides those in ``rows``.
        num_source_rows: rows of the files, where ``rows`` has some of them more than once; else None.
    """

    rows: pl.DataFrame
    minute: pl.Expr | None = None
    static: bool = False
    rules: tuple[tuple[str, pl.Expr], ...] = ()
    patients: tuple[str, ...] = ()
    num_source_rows: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a patient's minutes count from, in an input of instants.

    Attributes:
        variable: the first event of this variable; without one, the patient's timed events are rejects.  None: the
            first event of any variable but those of ``never``, or of those where there is no other.
        never: a regular expression.
    """

    variable: str | None = None
    never: str | None = None

    def counts(self, variables: Sequence[str]) -> npt.NDArray[np.bool_]:
        """[V] whether an event of the variable may be the origin."""
        if self.variable is not None:
            return np.array([name == self.variable for name in variables], dtype=np.bool_)
        never = re.compile(self.never or "(?!)")  # an expression that fits nothing
        return np.array([never.search(name) is None for name in variables], dtype=np.bool_)


class Source(ABC):
    """One input.  Frozen and picklable: it travels to worker processes with each piece."""

    name: str
    """The ``--format``."""

    events_decided_by: ClassVar[tuple[str, ...]] = ()
    """Options that decide which events there are, so that a vocabulary fits no other choice of them."""

    @property
    @abstractmethod
    def options(self) -> dict[str, object]:
        """What decides the rows besides the files' content; goes into the manifest."""

    @property
    def origin(self) -> Origin:
        return Origin()

    @abstractmethod
    def inputs(self) -> list[Path]:
        """Every file that is read; their content makes the fingerprint."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The input, divided; independent of the number of workers."""

    @abstractmethod
    def read(self, piece: Piece) -> RawRows: ...

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        """Where from, and ``patient_id``, ``label``, a row a patient; None where the input has no labels.

        A column ``subject``, where there is one, says whose hash decides the patient's split instead of its own.
        """
        return None

    def splits(self) -> pl.DataFrame | None:
        """``patient_id``, ``split``: a row a patient; None where patients are to be split by hash."""
        return None

    def statistics(self) -> Path | None:
        """A CSV of ``variable``, ``mean``, ``std`` to scale with instead of the train split's own."""
        return None

    def embeddings(self) -> Path | None:
        """A CSV of ``Key`` and a vector for every variable."""
        return None

    def descriptions(self) -> dict[str, str]:
        """What variables mean, in words."""
        return {}


def number_rows(columns: dict[str, pl.Series], *, file: int = 0, first: int = 1) -> pl.DataFrame:
    """Columns of one file, with ``file`` and ``row`` before them."""
    frame = pl.DataFrame(columns)
    return frame.select(
        pl.lit(file, dtype=pl.UInt32).alias(FILE),
        pl.int_range(first, first + pl.len(), dtype=pl.Int64).alias(ROW),
        *columns,
    )


def plain_column(path: Path, name: str, column: pl.Series, *, instants: bool = False) -> pl.Series:
    """The column if it holds numbers, text or (where ``instants``) dates; names of categories become text.

    Raises:
        UserError: it holds anything else.
    """
    dtype = column.dtype
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return column.cast(pl.String)
    if (
        dtype.is_numeric()
        or dtype in (pl.String, pl.Boolean, pl.Null)
        or (instants and dtype in (pl.Datetime, pl.Date))
    ):
        return column
    raise UserError(f"{path}: column {name!r} holds {dtype}; it must hold numbers or text, or dates as --time_column")


def utc(column: pl.Series) -> pl.Series:
    """Dates, with or without time and zone, as ``Datetime("us")``."""
    if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.Datetime("us"))


def patient_ids(column: pl.Series) -> pl.Series:
    """Patient ids as text; whole numbers lose their fraction: ``200001.0`` is patient 200001."""
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        column = pl.select(
            pl.when(whole == column).then(whole.cast(pl.String)).otherwise(column.cast(pl.String))
        ).to_series()
    text = column.cast(pl.String)
    suffixed = text.str.ends_with(".0")
    if suffixed.any():
        text = text.str.replace(r"^([+-]?\d+)\.0$", "${1}")
    return text.alias(PATIENT_ID)


def group_files(sizes: Sequence[tuple[str, int]], most_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Pieces of whole files, about ``most_bytes`` each, in the order given."""
    pieces: list[Piece] = []
    names: list[str] = []
    total = 0
    for name, size in sizes:
        if names and total + size > most_bytes:
            pieces.append(Piece(files=tuple(names)))
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        pieces.append(Piece(files=tuple(names)))
    return pieces


def file_pieces(files: Sequence[tuple[Path, str]]) -> list[Piece]:
    """Pieces of files and their names in rejects: small files together, large Parquet files by row groups.

    Parquet is counted by its rows: packed, they may take a byte each or fifty.
    """
    whole: list[tuple[str, int]] = []
    parts: list[Piece] = []
    for path, name in files:
        if path.suffix != ".parquet":
            whole.append((name, path.stat().st_size))
            continue
        try:
            metadata = pq.read_metadata(path)
        except UNREADABLE as error:
            raise unreadable(path, error) from None
        if metadata.num_rows * ROW_BYTES <= PIECE_BYTES:
            whole.append((name, metadata.num_rows * ROW_BYTES))
            continue
        start = num_bytes = 0
        for group in range(metadata.num_row_groups):
            num_bytes += metadata.row_group(group).num_rows * ROW_BYTES
            if num_bytes >= PIECE_BYTES or group + 1 == metadata.num_row_groups:
                parts.append(Piece(files=(name,), start=start, stop=group + 1))
                start, num_bytes = group + 1, 0
    return group_files(whole) + parts


def parquet_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns.

    Raises:
        UserError: it is none.
    """
    try:
        return list(pq.read_schema(path).names)
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def read_parquet(
    path: Path, piece: Piece, columns: list[str], *, of_names: Sequence[str] = ()
) -> tuple[pl.DataFrame, int]:
    """Columns of one file of a piece, and the number of its first row, from 1.

    Args:
        of_names: columns of texts that repeat, to be read as names (``pipeline.prepare.names``), at a sixth of the
        price.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with pq.ParquetFile(path, read_dictionary=of_names) as file:
            groups = range(piece.start, piece.stop) if piece.stop else range(file.num_row_groups)
            before = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            table = file.read_row_groups(groups, columns=columns)
        encoded = [name for name in of_names if pa.types.is_dictionary(table.schema.field(name).type)]
        frame = frame_of(table.drop_columns(encoded)).with_columns(
            names.from_dictionary(name, table[name]) for name in encoded
        )
    except (*UNREADABLE, KeyError) as error:  # of a column of names that is nested
        raise unreadable(path, error) from None
    return frame, 1 + before


def frame_of(table: pa.Table) -> pl.DataFrame:
    """The columns without metadata, when their text is text: Polars takes both on trust, and panics.

    Raises:
        pa.ArrowException, pl.exceptions.PolarsError: they are damaged, or of a type that Polars has not.
    """
    table.validate(full=True)
    frame = pl.from_arrow(pa.Table.from_arrays(table.columns, names=table.column_names))
    assert isinstance(frame, pl.DataFrame)
    return frame


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be read ({str(error).splitlines()[0]}); give a whole, valid file, or leave it out"
    )


def check_splits(patients: dict[str, list[str]], origin: Path) -> pl.DataFrame:
    """``patient_id``, ``split`` from the patients of each split.

    Raises:
        UserError: a patient is in two of them.
    """
    frame = (
        pl.concat(
            pl.DataFrame(
                {PATIENT_ID: patients[split], SPLIT: [split] * len(patients[split])},
                schema={PATIENT_ID: pl.String, SPLIT: pl.String},
            )
            for split in SPLITS
            if split in patients
        )
        .unique()
        .sort(PATIENT_ID, SPLIT)
    )
    for (before, first), (patient, second) in pairwise(frame.iter_rows()):
        if before == patient:
            number = patients[first].index(patient) + 1
            raise UserError(f"{origin}: patient number {number} of {first} is in {second} too; leave it in one")
    return frame
