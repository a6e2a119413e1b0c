"""The interface of an input format: pieces to read in any order, their rows as they came, labels and splits."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from pipeline.options import Section, option
from pipeline.prepare.columns import to_patient_names
from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.label_files import LABEL_ID_COLUMNS, LabelColumns, LabelKind
from pipeline.prepare.sources.labels import LABEL_CLASSES_HELP, LABEL_KIND_HELP, Labels, read_labels
from pipeline.prepare.sources.listing import Listing, is_parquet, list_tables
from pipeline.prepare.sources.reading import ROW_BYTES, SPLIT, Piece, group_files, pick_column, reading
from pipeline.prepare.sources.side_files import read_column_titles, read_frames
from pipeline.prepare.sources.typed_rows import ReadTexts
from pipeline.schema import PATIENT_ID, SPLITS, UserError

EVENTS: Final = "events/"
"""Stands before the names of files of events among all inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRows:
    """The rows of a piece, none left out.

    ``rows`` has ``file``, ``row``, then ``patient_id``, ``minute``, ``variable``, ``value`` and perhaps ``set_index``
    and ``site`` in whatever dtype they came, or as the numbers that texts are, with ``read_texts``; other columns serve
    the expressions.  ``minute`` makes of them minutes (float64), or instants (``Datetime("us")``) that become minutes
    from the patient's origin; null or not finite = cannot be used.  It is None where the column ``minute`` holds plain
    numbers.
    """

    rows: pl.DataFrame
    minute: pl.Expr | None = None
    static: bool = False  # whether an event without a minute belongs to the patient's static set
    categories: Mapping[str, float] = field(default_factory=dict)  # numbers of "variable=text"
    text_events: bool = False  # whether any other text makes the event "variable=text", or is a bad value
    rules: tuple[tuple[str, pl.Expr], ...] = ()  # reasons to reject that only this format knows, tried first
    patients: tuple[str, ...] = ()  # that the input names besides those in rows
    num_source_rows: int | None = None  # of the files, where a row of theirs is several of rows
    columns: Mapping[str, str] = field(default_factory=dict)  # names that canonical columns have in the files
    read_texts: ReadTexts | None = None  # returns rejected rows as they came


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The event from which a patient's minutes count, in an input of instants.

    It is the first event of ``variable``; without one, the patient's timed events are rejected.  Where that is None, it
    is the first event of any variable but those that fit the expression ``never``, or of those where there is no other.
    """

    variable: str | None = None
    never: str = "(?!)"  # fits nothing

    def may_be(self, variables: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return [V] whether an event of each variable may be the origin."""
        if self.variable is not None:
            return np.array([name == self.variable for name in variables], dtype=np.bool_)
        never = re.compile(self.never)
        return np.array([never.search(name) is None for name in variables], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class GivenSplits:
    """Splits of patients that an input gives.

    Attributes:
        path: the file or folder that they are from.
        read: yields ``patient_id`` (none missing) and ``split``, some rows at a time; the same again when it is called
            again.
    """

    path: Path
    read: Callable[[], Iterator[pl.DataFrame]]


@dataclass(frozen=True, kw_only=True)
class SideFileOptions(Section):
    """Labels, splits and embeddings, from files of their own."""

    labels: Path | None = option(None, "CSV or Parquet file of labels, or a folder of them such as MEDS label files.")
    label_column: str | None = option(None, "Column of the outcome in --labels.")
    label_kind: LabelKind = option("auto", LABEL_KIND_HELP)
    label_classes: tuple[str, ...] = option((), LABEL_CLASSES_HELP)
    splits: Path | None = option(
        None, "CSV or Parquet file, or a folder of them, of each patient's split: train, valid or test. It takes the "
        "place of splits that the input has.",
    )  # fmt: skip
    embeddings: Path | None = option(None, "CSV file with a column Key and a vector for each variable.")


@dataclass(frozen=True, kw_only=True)
class Source(SideFileOptions, ABC):
    """One input.  It is frozen and picklable: it travels to worker processes with each piece."""

    name: ClassVar[str]
    """The value of ``--format``."""
    event_options: ClassVar[tuple[str, ...]] = ()
    """Options that decide which events there are, so that a vocabulary fits no other choice of them."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Options that this format does not take."""

    wanted: ClassVar[str] = "files here"
    """Which files an input without any lacks, and what to name instead."""
    files_are_patients: ClassVar[bool] = False
    """Whether each file holds one patient, and is named like it."""

    path: Path  # the file, folder or pattern that was named

    @property
    def options(self) -> dict[str, Any]:
        """Return what decides the rows besides the content of files, for the manifest."""
        others = ("path", "labels", "embeddings", "splits", *self.unused)
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}

    @property
    def origin(self) -> Origin:
        return Origin()

    @property
    def base(self) -> Path:
        """The folder that names of files are relative to."""
        return self.path

    @abstractmethod
    def list_events(self) -> Listing:
        """Return the files of events, and those like them that are left out."""

    def find_events(self) -> dict[str, Path]:
        """Return the files of events, by their names relative to the input; raise UserError where there are none."""
        named = {path.relative_to(self.base).as_posix(): path for path in self.list_events().files}
        if not named:
            raise UserError(f"{self.path}: no {self.wanted}")
        return named

    def name_site(self, name: str) -> str:
        """Return where the rows of a file come from, as far as its name says: the file, or its folder."""
        return f"{Path(name).parent.as_posix()}/" if self.files_are_patients else name

    def pieces(self) -> list[Piece]:
        """Divide the input into pieces, which do not depend on the number of workers."""
        return group_files({name: path.stat().st_size for name, path in self.find_events().items()})

    def cut(self) -> tuple[list[Piece], dict[str, str]]:
        """Return the pieces, and the sha256 of files that were read for them, by their names among :meth:`inputs`."""
        return self.pieces(), {}

    def sample(self, name: str, path: Path, num_bytes: int) -> tuple[Piece, float]:
        """Return the beginning of a file, of about so many bytes, or the whole file; and its share of the file."""
        if not is_parquet(path):
            return Piece(files=(name,)), 1.0
        with reading(path):
            num_rows = pq.read_metadata(path).num_rows
        max_rows = max(1, num_bytes // ROW_BYTES)
        return Piece(files=(name,), max_rows=max_rows), min(1.0, max_rows / max(1, num_rows))

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[RawRows]:
        """Read all rows of a piece, in parts of bounded size; rows of one part have columns of the same types."""

    def find_side_files(self) -> dict[str, Path | None]:
        """Return the other files that are read, by what they are read as.

        ``statistics`` is a CSV file of ``variable``, ``mean``, ``std`` that replace those of the train split.
        """
        return {"labels": self.labels, "embeddings": self.embeddings, "splits": self.splits}

    def inputs(self) -> dict[str, Path]:
        """Return every file that is read, by what it is read as and its place in the input.

        Both decide the output as the content of the file does: a file in another folder may be of another split.
        """
        found = {EVENTS + name: path for name, path in self.find_events().items()}
        side_files = [(role, top) for role, top in self.find_side_files().items() if top is not None]
        for role, top in side_files:
            found |= {f"{role}/{path.relative_to(top.parent).as_posix()}": path for path in list_tables(top)}
        return found

    def read_labels(self, hide: Hide | None = None) -> Labels | None:
        """Return the labels of the task ``default``; None without labels.

        ``hide`` returns the names by which the data set calls patients of some names, if they are others.
        """
        path = self.find_side_files()["labels"]
        return None if path is None else read_labels(path, self.label_columns, hide)

    @property
    def label_columns(self) -> LabelColumns:
        """Return which columns of ``--labels`` serve as what."""
        patient = getattr(self, "patient_column", None)
        kind, classes = self.label_kind, self.label_classes
        return LabelColumns(label=self.label_column, patient=patient, kind=kind, classes=classes)

    def find_splits(self) -> GivenSplits | None:
        """Return the splits of ``--splits``, or else those that the input has; see :meth:`read_splits`."""
        if self.splits is None:
            return self.read_splits()
        paths, patient = list_tables(self.splits), self.label_columns.patient
        if not paths:
            raise UserError(f"{self.splits}: no Parquet or CSV files here; name the file of splits")
        return GivenSplits(self.splits, lambda: chain.from_iterable(_read_split_file(path, patient) for path in paths))

    def read_splits(self) -> GivenSplits | None:
        """Return the splits that the input has; None where a hash splits patients."""
        return None

    def describe(self) -> list[str]:
        """Return in words what was recognised, which columns serve as what, and what is not followed."""
        listing = self.list_events()
        files = f"{len(listing.files):,} files" if len(listing.files) != 1 else "1 file"
        left_out = f"; {len(listing.left_out):,} left out, whose names begin with . or _" if listing.left_out else ""
        return [f"{self.path}: {files}{left_out}"]

    def read_descriptions(self) -> dict[str, str]:
        """Return what variables mean, in words."""
        return {}


def _read_split_file(path: Path, patient: str | None) -> Iterator[pl.DataFrame]:
    """Yield ``patient_id`` and ``split`` of a file of ``--splits``, some rows at a time."""
    id_columns = [patient, *LABEL_ID_COLUMNS] if patient else LABEL_ID_COLUMNS
    for first, patients, splits in read_split_slices(path, id_columns, "patient_id,split"):
        ids, split = to_patient_names(patients), splits.str.strip_chars()
        wrong = (ids.is_null() | ~split.is_in(SPLITS).fill_null(False)).arg_true()
        if len(wrong):
            row = f"row {wrong[0] + first}"
            raise UserError(f"{path}: {row} has no patient, or no split among {', '.join(SPLITS)}; mend it")
        yield pl.DataFrame({PATIENT_ID: ids, SPLIT: split})


def read_split_slices(path: Path, id_columns: Sequence[str], header: str) -> Iterator[tuple[int, pl.Series, pl.Series]]:
    """Yield some rows of a file of splits at a time: the number of the first, the patients as they came, and splits.

    Patients are the first of the ``id_columns`` that the file has; ``header`` is one that it should have.
    """
    titles, first = read_column_titles(path), 1
    split = pick_column(path, titles, SPLIT, (), f"a header {header}")
    patient = pick_column(path, titles, None, id_columns, f"a header {header}")
    for frame in read_frames(path, list(dict.fromkeys([patient, split]))):
        yield first, frame[patient], frame[split].cast(pl.String)
        first += frame.height
