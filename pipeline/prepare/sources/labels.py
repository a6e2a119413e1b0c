"""Read tables of labels: a patient, perhaps a prediction time, and a label a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import polars as pl

from pipeline.prepare.columns import is_missing, to_numbers, to_patient_names, to_times
from pipeline.prepare.sources.listing import list_tables
from pipeline.prepare.sources.reading import ID_COLUMNS, pick_column
from pipeline.prepare.sources.side_files import read_frame
from pipeline.schema import FLOAT32_MAX, LABEL, PATIENT_ID, TIME_COLUMNS, Kind, UserError

LABEL_COLUMNS: Final = (
    "label", "in_hospital_mortality", "In-hospital_death", "boolean_value", "integer_value", "float_value",
    "categorical_value",
)  # fmt: skip
LABEL_ID_COLUMNS: Final = (*ID_COLUMNS, "hadm_id")

CLASSES: Final = ("0", "1")
"""Names of the classes of a binary task."""

UNKNOWN_IS_MINUS_1: Final = ("Length_of_stay", "Survival", "SAPS-I", "SOFA")
"""Columns of PhysioNet 2012's outcomes in which -1 says that the number is not known."""

LABEL_CLASSES_HELP: Final = (
    "Names of the classes, in their order, of labels that are classes; by default those that occur. Give those of a "
    "trained model to evaluate it on labels that lack one."
)
LabelKind = Literal["auto", "binary", "multiclass", "regression"]
LABEL_KIND_HELP: Final = (
    "What labels are: 0 and 1 (binary), names or numbers of classes (multiclass), or numbers (regression). Default: as "
    "they look; what whole numbers other than 0 and 1 are must be said."
)


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a task.

    Attributes:
        origin: the file or folder that they are from.
        frame: ``patient_id``, ``label`` (null = unlabelled; its type is that of ``LABEL_TYPES``), and perhaps one of
            ``prediction_time`` and ``prediction_minute``; a row a sample, each once.
        kind: of the task.
        classes: names of the classes that labels are the numbers of; empty for a regression.
    """

    origin: str
    frame: pl.DataFrame
    kind: Kind = "binary"
    classes: tuple[str, ...] = CLASSES

    @property
    def time_column(self) -> str | None:
        """Return the column of prediction times that there is."""
        return next((name for name in TIME_COLUMNS.values() if name in self.frame.columns), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelColumns:
    """Which columns serve as what; None = found by their usual names.

    Attributes:
        patient: tried before the usual names.
        time: of dates, or else of minutes.
        kind: of the labels; ``auto`` looks at them.
        classes: names of the classes in their order; none = those that occur.
    """

    label: str | None = None
    patient: str | None = None
    time: str | None = None
    kind: LabelKind = "auto"
    classes: tuple[str, ...] = ()


def read_labels(path: Path, columns: LabelColumns | None = None) -> Labels:
    """Return the labels of a CSV or Parquet file, or of all such files of a folder and its folders.

    Empty means unlabelled, and so does -1 unless labels are numbers.

    Raises:
        UserError: a file cannot be read, has no such columns, holds what is no label, or contradicts itself.
    """
    files = list_tables(path)
    if not files:
        raise UserError(f"{path}: no Parquet or CSV files here; name the label file, or the folder of a task")
    return read_label_files(files, str(path), columns or LabelColumns())


def read_label_files(files: Sequence[Path], origin: str, columns: LabelColumns) -> Labels:
    """Return the labels of some files as those of one task; see :func:`read_labels`."""
    frames, names = zip(*(_read_file(file, columns) for file in files), strict=True)
    for file, frame in zip(files, frames, strict=True):
        if frame.columns != frames[0].columns:
            raise UserError(f"{file}: has other columns of times than {files[0]}; make the files alike")
    kind = columns.kind
    if kind == "auto":
        kind = "multiclass" if columns.classes else find_kind([frame[LABEL] for frame in frames], names[0])
    where = zip(files, names, strict=True)
    parsed = [parse_labels(*at, frame[LABEL], kind) for at, frame in zip(where, frames, strict=True)]
    rows = pl.concat([frame.with_columns(label) for frame, label in zip(frames, parsed, strict=True)])
    rows = rows.filter(pl.col(PATIENT_ID).is_not_null())
    classes: tuple[str, ...] = CLASSES if kind == "binary" else ()
    if kind == "multiclass":
        classes = columns.classes or _find_classes(rows)
        if len(classes) < 2:
            raise UserError(f"{origin}: column {names[0]!r} has fewer than two classes; name another --label_column")
        if not rows[LABEL].drop_nulls().is_in(classes).all():
            raise UserError(
                f"{origin}: column {names[0]!r} has labels that are not in --label_classes; name all classes"
            )
        rows = rows.with_columns(pl.col(LABEL).replace_strict(classes, range(len(classes)), return_dtype=pl.Int32))
    return Labels(origin, merge_samples(origin, rows), kind, classes)


def _find_classes(rows: pl.DataFrame) -> tuple[str, ...]:
    """Return the classes that occur: numbers by size, then words."""
    by_size = pl.col(LABEL).cast(pl.Float64, strict=False)
    found = rows.select(pl.col(LABEL).unique().drop_nulls()).sort(by_size, LABEL, nulls_last=True)
    return tuple(found[LABEL])


def _read_file(path: Path, columns: LabelColumns) -> tuple[pl.DataFrame, str]:
    """Return the columns of a file by the names that they serve as, labels as they are, and the name of the labels'."""
    frame = read_frame(path)
    id_columns = [columns.patient, *LABEL_ID_COLUMNS] if columns.patient else LABEL_ID_COLUMNS
    id_name = pick_column(path, frame.columns, None, id_columns, "--patient_column, or one of these headers")
    filled = [name for name in LABEL_COLUMNS if name in frame.columns and frame[name].null_count() < frame.height]
    label_name = pick_column(path, frame.columns, columns.label, filled or LABEL_COLUMNS, "--label_column")
    found = {PATIENT_ID: to_patient_names(frame[id_name])}
    times = [columns.time] if columns.time else [name for name in TIME_COLUMNS.values() if name in frame.columns]
    if times:
        time = frame[pick_column(path, frame.columns, times[0], (), "--time_column")]
        found |= _parse_times(path, time)
    for name, column in found.items() if times else ():
        if column.null_count():
            row = column.is_null().arg_true()[0] + 1
            what = id_name if name == PATIENT_ID else times[0]
            raise UserError(f"{path}: row {row} has no {what}; give one, or leave the row out")
    return pl.DataFrame(found | {LABEL: frame[label_name]}), label_name


def _parse_times(path: Path, column: pl.Series) -> dict[str, pl.Series]:
    """Return prediction times by the name of the column that they are; raise UserError where one is neither."""
    is_given = ~is_missing(column)
    times = to_times(column, are_numbers_minutes=True)
    name = TIME_COLUMNS["date" if isinstance(times.dtype, pl.Datetime) else "minute"]
    wrong = (times.is_null() & is_given).arg_true()
    if len(wrong):
        row = f"row {wrong[0] + 1}, column {column.name!r}"
        raise UserError(f"{path}: {row}: neither an ISO date nor a number of minutes; mend it")
    return {name: times}


def find_kind(labels: Sequence[pl.Series], name: str) -> Kind:
    """Return of what kind labels are that stand in columns called ``name``.

    Labels that are all 0, 1, true or false are binary, words are classes, and what has fractions or is MEDS's
    ``float_value`` is numbers.  Other whole numbers may be either, so a person must say.
    """
    numbers = pl.concat([_to_numbers(column) for column in labels])
    given = ~pl.concat([_is_unlabelled(column) for column in labels])
    if numbers.is_in([0.0, 1.0, -1.0]).fill_null(False).filter(given).all():
        return "binary"
    if not (numbers.is_not_null() & given).any():
        return "multiclass"
    has_fractions = bool((numbers != numbers.floor()).any()) or name == "float_value"
    return "regression" if has_fractions and numbers.is_not_null().filter(given).all() else "binary"


def parse_labels(path: Path, name: str, labels: pl.Series, kind: Kind) -> pl.Series:
    """Return labels of a kind, null = unlabelled: 0 or 1 as int8, names of classes, or float64.

    Raises:
        UserError: a label is none of the kind; ``path`` and ``name`` say of which file and column.
    """
    number, is_none = _to_numbers(labels), _is_unlabelled(labels)
    if kind == "multiclass":
        # A whole number is the same class whether it was stored as 2 or as 2.0.
        whole = (number.floor() == number).fill_null(False)
        names = pl.select(
            pl.when(whole).then(number.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(_text(labels))
        )
        return names.to_series().set(is_none | (number == -1).fill_null(False), None).alias(LABEL)
    if kind == "binary":
        is_right, what = number.is_in([0.0, 1.0, -1.0]).fill_null(False), "0, 1, or empty or -1 for none"
        advice = "mend it, or say --label_kind multiclass or regression"
        is_none |= (number == -1).fill_null(False)
    else:
        is_right = (number.abs() <= FLOAT32_MAX).fill_null(False)  # as batches hold them
        what, advice = "a number, or empty for none", "mend it"
        if name in UNKNOWN_IS_MINUS_1:
            is_none |= (number == -1).fill_null(False)
    wrong = (~(is_none | is_right)).arg_true()
    if len(wrong):
        raise UserError(f"{path}: row {wrong[0] + 1}, column {name!r}: a label is {what}; {advice}")
    number = number.set(is_none, None)
    return number.cast(pl.Int8 if kind == "binary" else pl.Float64, strict=False).alias(LABEL)


def _text(labels: pl.Series) -> pl.Series:
    return labels.cast(pl.String).str.strip_chars()


def _to_numbers(labels: pl.Series) -> pl.Series:
    """Return labels as float64, true and false as 1 and 0; null where one is no number, as a time is none."""
    return to_numbers(labels if labels.dtype.is_numeric() else _text(labels))


def _is_unlabelled(labels: pl.Series) -> pl.Series:
    """Return where a label is missing: null, blank, or not a number."""
    text = _text(labels).str.to_lowercase()
    return text.is_null() | text.is_in(["", "nan", "+nan", "-nan"]).fill_null(False)


def merge_samples(origin: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Return each sample once, in order; raise UserError where two labels of a sample contradict."""
    keys = [name for name in rows.columns if name != LABEL]
    merged = rows.group_by(keys).agg(pl.col(LABEL).min(), pl.col(LABEL).max().alias("max")).sort(keys)
    contradicting = merged.filter(pl.col(LABEL) != pl.col("max"))
    if contradicting.height:
        same = rows.select(keys).with_row_index("row").join(contradicting[:1].select(keys), on=keys, how="semi")
        first, last = same["row"].min(), same["row"].max()
        where = f"rows {first + 1} to {last + 1}"  # type: ignore[operator]
        raise UserError(f"{origin}: {where} give one sample two labels; keep one")
    return merged.drop("max")
