"""Read the files that are no events: labels, statistics, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare.columns import to_patient_names, to_variable_names
from pipeline.prepare.sources.reading import LABEL, pick_column, reading
from pipeline.schema import FIRST_CODE, PATIENT_ID, VARIABLE, UserError

LABEL_COLUMNS: Final = ("label", "in_hospital_mortality", "In-hospital_death")
ID_COLUMNS: Final = ("patient_id", "ts_id", "RecordID", "subject_id")


def read_frame(path: Path, needed: Sequence[str] = (), header: str | None = None) -> pl.DataFrame:
    """Return a whole CSV file (every column as text) or Parquet file.

    One that has not all ``needed`` columns is a UserError that shows the ``header`` that it should have.
    """
    with reading(path):
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path, glob=False, hive_partitioning=False)
        else:
            frame = pl.read_csv(path, infer_schema=False, separator=separator_of(path), glob=False)
    for name in needed:
        pick_column(path, frame.columns, name, (), f"a header {header or ','.join(needed)}")
    return frame


def separator_of(path: Path) -> str:
    return "\t" if ".tsv" in path.suffixes else ","


def read_labels(path: Path, label_column: str | None = None, id_column: str | None = None) -> pl.DataFrame:
    """Return ``patient_id``, ``label`` of a CSV or Parquet file, a row a patient; empty and -1 mean unlabelled.

    Where the file has no ``id_column``, the patient is one of ``ID_COLUMNS``.
    """
    frame = read_frame(path)
    id_columns = [id_column, *ID_COLUMNS] if id_column else ID_COLUMNS
    id_name = pick_column(path, frame.columns, None, id_columns, "one of these headers")
    label_name = pick_column(path, frame.columns, label_column, LABEL_COLUMNS, "--label_column")
    return merge_labels(path, to_patient_names(frame[id_name]), parse_labels(path, frame[label_name]))


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


def merge_labels(path: Path, ids: pl.Series, labels: pl.Series) -> pl.DataFrame:
    """Return ``patient_id``, ``label``, a row a patient; raise UserError where two labels of a patient contradict."""
    known = pl.DataFrame({PATIENT_ID: ids, LABEL: labels}).filter(pl.col(PATIENT_ID).is_not_null())
    merged = known.group_by(PATIENT_ID).agg(pl.col(LABEL).min(), pl.col(LABEL).max().alias("max")).sort(PATIENT_ID)
    contradicting = merged.filter(pl.col(LABEL) != pl.col("max"))
    if contradicting.height:
        rows = (ids == contradicting[PATIENT_ID][0]).arg_true() + 1
        raise UserError(f"{path}: rows {rows[0]} to {rows[-1]} give a patient both label 0 and label 1; keep one")
    return merged.select(PATIENT_ID, LABEL)


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
