"""Read tables of labels: a patient, perhaps a prediction time, and a label a row.

A table may be larger than memory.  It is read twice, in parts: to see what its columns hold, and to sort its samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare import names
from pipeline.prepare.name_hashes import hash_names
from pipeline.prepare.sort_samples import NO_DATE, NO_MINUTE, ContradictionError, Hide, SampleSorter, SortedSamples
from pipeline.prepare.sources.label_files import LabelColumns, LabelFile
from pipeline.prepare.sources.label_values import find_kind, sort_classes
from pipeline.prepare.sources.listing import list_tables
from pipeline.schema import LABEL, PATIENT_ID, TIME_COLUMNS, Kind, Times, UserError

CLASSES: Final = ("0", "1")
"""Names of the classes of a binary task."""

LABEL_TYPES: Final[dict[Kind, Any]] = {"binary": pl.Int8, "multiclass": pl.Int32, "regression": pl.Float64}
TIME_TYPES: Final[dict[Times, Any]] = {"date": pl.Datetime("us"), "minute": pl.Float64}

LABEL_CLASSES_HELP: Final = (
    "Names of the classes, in their order, of labels that are classes; by default those that occur. Give those of a "
    "trained model to evaluate it on labels that lack one."
)
LABEL_KIND_HELP: Final = (
    "What labels are: 0 and 1, or probabilities between them (binary), names or numbers of classes (multiclass), or "
    "numbers (regression). Default: as they look; what whole numbers other than 0 and 1, and probabilities, are must "
    "be said."
)


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a task.

    Attributes:
        origin: the file or folder that they are from.
        samples: by patient and time, each once; labels are numbers, of classes their positions.
        kind: of the task.
        classes: names of the classes that labels are the numbers of; empty for a regression.
        is_soft: whether labels of a binary task are probabilities, which count as 1 from one half on.
        warnings: that a person should see.
    """

    origin: str
    samples: SortedSamples
    kind: Kind = "binary"
    classes: tuple[str, ...] = CLASSES
    is_soft: bool = False
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_frame(
        cls,
        origin: str,
        frame: pl.DataFrame,
        kind: Kind = "binary",
        classes: tuple[str, ...] = CLASSES,
        hide: Hide | None = None,
    ) -> Self:
        """Return the labels of a table in memory: ``patient_id``, perhaps a time, and ``label``; null = unlabelled."""
        times = next((name for name, column in TIME_COLUMNS.items() if column in frame.columns), None)
        sorter = SampleSorter(times, hide)
        time = frame[TIME_COLUMNS[times]] if times else None
        sorter.add(names.encode(frame[PATIENT_ID]), _to_record_times(time), _to_floats(frame[LABEL]))
        try:
            return cls(origin, sorter.finish(), kind, classes)
        except ContradictionError:
            raise UserError(f"{origin}: one sample has two labels; keep one") from None

    @property
    def time_column(self) -> str | None:
        """Return the column of prediction times that there is."""
        return TIME_COLUMNS[self.samples.times] if self.samples.times else None

    def to_columns(self, records: npt.NDArray[Any]) -> list[pl.Series]:
        """Return times, if there are some, and labels of records as columns; null = missing."""
        label = pl.Series(LABEL, records["label"]).fill_nan(None)
        label = label.cast(pl.Float32 if self.is_soft else LABEL_TYPES[self.kind])
        if self.samples.times is None:
            return [label]
        missing = NO_DATE if self.samples.times == "date" else NO_MINUTE
        time = pl.Series(self.time_column, records["time"])
        return [time.set(time == missing, None).cast(TIME_TYPES[self.samples.times]), label]


def _to_floats(labels: pl.Series) -> npt.NDArray[np.float64]:
    return labels.cast(pl.Float64).fill_null(np.nan).to_numpy()


def _to_record_times(time: pl.Series | None) -> npt.NDArray[Any] | int:
    """Return times as records have them."""
    if time is None:
        return 0
    if isinstance(time.dtype, pl.Datetime):
        return time.cast(pl.Datetime("us")).to_physical().fill_null(NO_DATE).to_numpy()
    return time.cast(pl.Float64).fill_null(NO_MINUTE).to_numpy()


def read_labels(path: Path, columns: LabelColumns | None = None, hide: Hide | None = None) -> Labels:
    """Return the labels of a CSV or Parquet file, or of all such files of a folder and its folders.

    Missing means unlabelled, and so does -1 unless labels are numbers.  ``hide`` says how the data set calls patients.

    Raises:
        UserError: a file cannot be read, has no such columns, holds what is no label, or contradicts itself.
    """
    return read_label_files(_find_files(path), str(path), columns or LabelColumns(), hide)


def read_label_patients(path: Path, columns: LabelColumns) -> Iterator[pl.Series]:
    """Yield the names of the patients who have a sample of :func:`read_labels`, some rows at a time, each once."""
    for file in _find_files(path):
        yield from LabelFile.survey(file, columns).read_patients()


def _find_files(path: Path) -> list[Path]:
    files = list_tables(path)
    if not files:
        raise UserError(f"{path}: no Parquet or CSV files here; name the label file, or the folder of a task")
    return files


def read_label_files(paths: Sequence[Path], origin: str, columns: LabelColumns, hide: Hide | None = None) -> Labels:
    """Return the labels of some files as those of one task; see :func:`read_labels`."""
    files = [LabelFile.survey(path, columns) for path in paths]
    for file in files:
        if file.times != files[0].times:
            raise UserError(f"{file.path}: has other columns of times than {files[0].path}; make the files alike")
    kind, name = columns.kind, files[0].label
    if kind == "auto":
        kind = "multiclass" if columns.classes else find_kind([file.facts for file in files], name)
    classes: tuple[str, ...] = CLASSES if kind == "binary" else ()
    if kind == "multiclass":
        found = set().union(*(file.find_classes() for file in files))
        classes = columns.classes or sort_classes(found)
        if len(classes) < 2:
            raise UserError(f"{origin}: column {name!r} has fewer than two classes; name another --label_column")
        if not found <= set(classes):
            raise UserError(f"{origin}: column {name!r} has labels that are not in --label_classes; name all classes")
    sorter, is_soft = SampleSorter(files[0].times, hide), False
    for file in files:
        for _, patient, time, label in file.read_slices(kind):
            is_soft |= kind == "binary" and bool((label % 1 != 0).any())
            if kind == "multiclass":
                label = label.replace_strict(classes, range(len(classes)), return_dtype=pl.Int32)
            is_named = patient.is_not_null()
            if not is_named.all():  # without times; a row of nobody is no sample
                patient, label = patient.filter(is_named), label.filter(is_named)
            sorter.add(patient, _to_record_times(time), _to_floats(label))
    try:
        samples = sorter.finish()
    except ContradictionError as found_one:
        where = _find_rows(files, kind, found_one, hide)
        raise UserError(f"{origin}: {where} give one sample two labels; keep one") from None
    words = sum((file.facts.words for file in files), Counter[str]())
    return Labels(origin, samples, kind, classes, is_soft, _warn_of_words(name, words))


def _warn_of_words(name: str, words: Counter[str]) -> tuple[str, ...]:
    if not words:
        return ()
    which = ", ".join(f"{word!r} {number:,}" for word, number in sorted(words.items()))
    advice = "where one is a class, name all classes with --label_classes"
    return (f"column {name!r} has words that mean missing, so these samples are unlabelled: {which}; {advice}",)


def _find_rows(files: Sequence[LabelFile], kind: Kind, wanted: ContradictionError, hide: Hide | None) -> str:
    """Return in words the first and the last row of a sample, numbered over all files."""
    rows: list[int] = []
    num_before = 0

    def is_wanted(patients: pl.Series) -> pl.Series:
        first, second = hash_names(hide(patients) if hide else patients)
        return pl.Series((first == wanted.hashes[0]) & (second == wanted.hashes[1]))

    for file in files:
        for first, patient, time, _ in file.read_slices(kind):
            is_it = names.test(patient, is_wanted).fill_null(False).to_numpy()
            found = np.flatnonzero(is_it & (_to_record_times(time) == (wanted.time if time is not None else 0)))
            rows.extend((num_before + first + found).tolist())
        num_before += file.num_rows
    return f"rows {rows[0]} to {rows[-1]}"
