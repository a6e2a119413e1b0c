"""What an input format gives: pieces to read in any order, their rows as they came, labels and splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Protocol

import polars as pl

from pipeline.schema import PATIENT_ID, SPLITS, UserError

FILE: Final = "file"  # uint32, which of the piece's files
ROW: Final = "row"  # int64, data row of the file from 1; header lines do not count
LABEL: Final = "label"  # int8: 0, 1, or null = unlabelled
SPLIT: Final = "split"  # string, one of SPLITS

MICROSECONDS: Final = 60e6
"""Of a minute."""

PIECE_BYTES: Final = 1 << 26
"""About how much input a piece holds: two or three million events, some hundred MiB while they are worked on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one task reads: some small files, or a part of a large one.

    Attributes:
        files: names relative to the input, as rejects give them.
        start: first of the file's parts (row groups, or patients made up); 0 where files are read whole.
        stop: one past the last.
    """

    files: tuple[str, ...]
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRows:
    """The rows of a piece, none left out.

    Attributes:
        rows: ``file``, ``row``, then ``patient_id``, ``minute``, ``variable``, ``value`` and perhaps ``set_index`` in
            whatever dtype they came.
        minute: makes of them minutes (float64), or instants (``Datetime("us")``) that become minutes from the patient's
            first event; null or not finite = cannot be used.  None where ``minute`` holds plain numbers.
        rules: reasons to reject that only this format knows, tried first and in this order.
        patients: patients that the input names besides those in ``rows``.
    """

    rows: pl.DataFrame
    minute: pl.Expr | None = None
    rules: tuple[tuple[str, pl.Expr], ...] = ()
    patients: tuple[str, ...] = ()


class Source(Protocol):
    """One input.  Frozen and picklable: it travels to worker processes with each piece."""

    @property
    def name(self) -> str:
        """The ``--format``."""

    @property
    def options(self) -> dict[str, object]:
        """What decides the rows besides the files' content; goes into the manifest."""

    def inputs(self) -> list[Path]:
        """Every file that is read; their content makes the fingerprint."""

    def pieces(self) -> list[Piece]:
        """The input, divided; independent of the number of workers."""

    def read(self, piece: Piece) -> RawRows: ...

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        """Where from, and ``patient_id``, ``label``, a row a patient; None where the input has no labels."""

    def splits(self) -> pl.DataFrame | None:
        """``patient_id``, ``split``: a row a patient; None where patients are to be split by hash."""

    def statistics(self) -> Path | None:
        """A CSV of ``variable``, ``mean``, ``std`` to scale with instead of the train split's own."""

    def embeddings(self) -> Path | None:
        """A CSV of ``Key`` and a vector for every variable."""


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
            raise UserError(f"{origin}: patient {patient!r} is in {first} and in {second}; leave it in one")
    return frame
