"""Read tables of labels: a patient, perhaps a prediction time, and a label a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl

from pipeline.prepare.columns import is_missing, to_patient_names, to_times
from pipeline.prepare.sources.listing import list_tables
from pipeline.prepare.sources.reading import ID_COLUMNS, pick_column
from pipeline.prepare.sources.side_files import read_frame
from pipeline.schema import LABEL, PATIENT_ID, PREDICTION_MINUTE, PREDICTION_TIME, UserError

LABEL_COLUMNS: Final = (
    "label", "in_hospital_mortality", "In-hospital_death", "boolean_value", "integer_value", "float_value",
    "categorical_value",
)  # fmt: skip
LABEL_ID_COLUMNS: Final = (*ID_COLUMNS, "hadm_id")
TIME_COLUMNS: Final = (PREDICTION_TIME, PREDICTION_MINUTE)


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a task.

    Attributes:
        origin: the file or folder that they are from.
        frame: ``patient_id``, ``label`` (int8, null = unlabelled), and perhaps one of ``prediction_time`` and
            ``prediction_minute``; a row a sample, each once.
    """

    origin: str
    frame: pl.DataFrame

    @property
    def time_column(self) -> str | None:
        """Return the column of prediction times that there is."""
        return next((name for name in TIME_COLUMNS if name in self.frame.columns), None)


def read_labels(
    path: Path, label_column: str | None = None, patient_column: str | None = None, time_column: str | None = None
) -> Labels:
    """Return the labels of a CSV or Parquet file, or of all such files of a folder and its folders.

    Empty and -1 mean unlabelled.  Columns that are not named are found by their usual names; a file has no
    ``patient_column`` if its name is another's.  Times in ``time_column`` are dates, or else minutes.

    Raises:
        UserError: a file cannot be read, has no such columns, holds what is no label, or contradicts itself.
    """
    files = list_tables(path)
    if not files:
        raise UserError(f"{path}: no Parquet or CSV files here; name the label file, or the folder of a task")
    frames = [_read_file(file, label_column, patient_column, time_column) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if frame.columns != frames[0].columns:
            raise UserError(f"{file}: has other columns of times than {files[0]}; make the files alike")
    return Labels(str(path), merge_samples(path, pl.concat(frames)))


def _read_file(
    path: Path, label_column: str | None, patient_column: str | None, time_column: str | None
) -> pl.DataFrame:
    frame = read_frame(path)
    id_columns = [patient_column, *LABEL_ID_COLUMNS] if patient_column else LABEL_ID_COLUMNS
    id_name = pick_column(path, frame.columns, None, id_columns, "--patient_column, or one of these headers")
    filled = [name for name in LABEL_COLUMNS if name in frame.columns and frame[name].null_count() < frame.height]
    label_name = pick_column(path, frame.columns, label_column, filled or LABEL_COLUMNS, "--label_column")
    columns = {PATIENT_ID: to_patient_names(frame[id_name])}
    times = [time_column] if time_column else [name for name in TIME_COLUMNS if name in frame.columns]
    if times:
        time = frame[pick_column(path, frame.columns, times[0], (), "--time_column")]
        columns |= _parse_times(path, time)
    columns[LABEL] = parse_labels(path, frame[label_name])
    if not times:
        return pl.DataFrame(columns).filter(pl.col(PATIENT_ID).is_not_null())
    for name, column in columns.items():
        if name != LABEL and column.null_count():
            row = column.is_null().arg_true()[0] + 1
            what = id_name if name == PATIENT_ID else times[0]
            raise UserError(f"{path}: row {row} has no {what}; give one, or leave the row out")
    return pl.DataFrame(columns)


def _parse_times(path: Path, column: pl.Series) -> dict[str, pl.Series]:
    """Return prediction times by the name of the column that they are; raise UserError where one is neither."""
    is_given = ~is_missing(column)
    times = to_times(column, are_numbers_minutes=True)
    name = PREDICTION_TIME if isinstance(times.dtype, pl.Datetime) else PREDICTION_MINUTE
    wrong = (times.is_null() & is_given).arg_true()
    if len(wrong):
        row = f"row {wrong[0] + 1}, column {column.name!r}"
        raise UserError(f"{path}: {row}: neither an ISO date nor a number of minutes; mend it")
    return {name: times}


def parse_labels(path: Path, labels: pl.Series) -> pl.Series:
    """Return labels as int8: 0, 1 or null; raise UserError where one is none of 0, 1, true, false, -1 or empty."""
    text = labels.cast(pl.String).str.strip_chars().str.to_lowercase().replace({"true": "1", "false": "0"})
    number = text.cast(pl.Float64, strict=False)
    is_empty = text.is_null() | (text == "") | number.is_nan().fill_null(False)
    wrong = (~(is_empty | number.is_in([0.0, 1.0, -1.0]).fill_null(False))).arg_true()
    if len(wrong):
        where = f"row {wrong[0] + 1}, column {labels.name!r}"
        raise UserError(f"{path}: {where}: a label is 0, 1, or empty or -1 for none; mend it")
    label = number.cast(pl.Int8, strict=False)
    return label.set(is_empty | (label == -1).fill_null(False), None)


def merge_samples(path: Path, rows: pl.DataFrame) -> pl.DataFrame:
    """Return each sample once, in order; raise UserError where two labels of a sample contradict."""
    keys = [name for name in rows.columns if name != LABEL]
    merged = rows.group_by(keys).agg(pl.col(LABEL).min(), pl.col(LABEL).max().alias("max")).sort(keys)
    contradicting = merged.filter(pl.col(LABEL) != pl.col("max"))
    if contradicting.height:
        same = rows.select(keys).with_row_index("row").join(contradicting[:1].select(keys), on=keys, how="semi")
        first, last = same["row"].min(), same["row"].max()
        where = f"rows {first + 1} to {last + 1}"  # type: ignore[operator]
        raise UserError(f"{path}: {where} give a patient both label 0 and label 1; keep one")
    return merged.drop("max")
