"""Files beside the events: outcomes, statistics, embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare.rules import ACTIONS, Range
from pipeline.prepare.sources.source import LABEL, patient_ids, unreadable
from pipeline.schema import FIRST_CODE, FLOAT32_MAX, PATIENT_ID, VARIABLE, UserError

LABEL_COLUMNS: Final = ("label", "in_hospital_mortality", "In-hospital_death")
ID_COLUMNS: Final = ("patient_id", "ts_id", "RecordID", "subject_id")


def read_frame(path: Path) -> pl.DataFrame:
    """A whole CSV (every column text) or Parquet file.

    Raises:
        UserError: it cannot be read as what its name says.
    """
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False, hive_partitioning=False)
        separator = "\t" if ".tsv" in path.suffixes else ","
        return pl.read_csv(path, infer_schema=False, separator=separator, glob=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise unreadable(path, error) from None


def pick_column(path: Path, columns: Iterable[str], wanted: str | None, known: Sequence[str], flag: str) -> str:
    """The column that a flag names, or the first of the ``known`` names that is there.

    Raises:
        UserError: there is none, or more than one.
    """
    columns = list(columns)
    for name in [wanted] if wanted is not None else known:
        if name in columns:
            if columns.count(name) > 1 or f"{name}_duplicated_0" in columns:  # as Polars renames the second
                raise UserError(f"{path}: column {name!r} is there more than once; keep one")
            return name
    missing = repr(wanted) if wanted is not None else " or ".join(map(repr, known))
    raise UserError(f"{path}: no column {missing}; name one of {', '.join(map(repr, columns))} with {flag}")


def read_labels(path: Path, label_column: str | None = None, id_column: str | None = None) -> pl.DataFrame:
    """``patient_id``, ``label`` of a CSV or Parquet file, a row a patient; empty and -1 mean unlabelled.

    Args:
        label_column: of the outcome; by default one of ``LABEL_COLUMNS``.
        id_column: of the patient, where the file has it; else one of ``ID_COLUMNS``.

    Raises:
        UserError: unreadable, a column is missing, a label is none of 0, 1, -1, or two labels contradict.
    """
    frame = read_frame(path)
    id_columns = (id_column, *ID_COLUMNS) if id_column else ID_COLUMNS
    id_name = pick_column(path, frame.columns, None, id_columns, "one of these headers")
    label_name = pick_column(path, frame.columns, label_column, LABEL_COLUMNS, "--label_column")
    ids = patient_ids(frame[id_name])
    return unique_labels(path, ids, parse_labels(path, frame[label_name]))


def parse_labels(path: Path, labels: pl.Series) -> pl.Series:
    """Labels as int8: 0, 1 or null.

    Raises:
        UserError: one is none of 0, 1, true, false, -1 or empty.
    """
    text = labels.cast(pl.String).str.strip_chars().str.to_lowercase().replace({"true": "1", "false": "0"})
    number = text.cast(pl.Float64, strict=False)
    empty = text.is_null() | (text == "") | (number.is_nan().fill_null(False))
    wrong = ~(empty | number.is_in([0.0, 1.0, -1.0]).fill_null(False))
    if wrong.any():
        row = wrong.arg_true()[0] + 1
        raise UserError(f"{path}: row {row}, column {labels.name!r}: a label is 0, 1, or empty or -1 for none; mend it")
    label = number.cast(pl.Int8, strict=False)
    return label.set(empty | (label == -1).fill_null(False), None)


def unique_labels(path: Path, ids: pl.Series, labels: pl.Series) -> pl.DataFrame:
    """``patient_id``, ``label``, a row a patient.

    Raises:
        UserError: two labels of a patient contradict.
    """
    known = pl.DataFrame({PATIENT_ID: ids, LABEL: labels}).filter(pl.col(PATIENT_ID).is_not_null())
    unique = known.group_by(PATIENT_ID).agg(pl.col(LABEL).min(), pl.col(LABEL).max().alias("most")).sort(PATIENT_ID)
    contradicting = unique.filter(pl.col(LABEL) != pl.col("most"))
    if contradicting.height:
        rows = (ids == contradicting[PATIENT_ID][0]).arg_true() + 1
        raise UserError(f"{path}: rows {rows[0]} to {rows[-1]} give a patient both label 0 and label 1; keep one")
    return unique.select(PATIENT_ID, LABEL)


def read_statistics(path: Path) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by variable, from a CSV of ``variable``, ``mean``, ``std``.

    A std of 0 or none is 1; a variable without a mean is left out.

    Raises:
        UserError: unreadable, a column is missing, or a variable stands there twice.
    """
    frame = read_frame(path)
    for name in (VARIABLE, "mean", "std"):
        pick_column(path, frame.columns, name, (), "a header variable,mean,std")
    numbers = frame.select(VARIABLE, pl.col("mean", "std").cast(pl.Float64, strict=False))
    _refuse_repeats(path, numbers[VARIABLE])
    finite = numbers.filter(pl.col("mean").is_finite())
    return {
        variable: (mean, std if std is not None and math.isfinite(std) and std > 0 else 1.0)
        for variable, mean, std in finite.iter_rows()
    }


def read_ranges(path: Path) -> dict[str, Range]:
    """Values that can be, by variable, from a CSV of ``variable``, ``low``, ``high`` and perhaps ``action``.

    An empty limit is none; the action is ``reject`` where nothing is said.

    Raises:
        UserError: unreadable, a column is missing, a variable stands there twice, or a row makes no sense.
    """
    frame = read_frame(path)
    for name in (VARIABLE, "low", "high"):
        pick_column(path, frame.columns, name, (), "a header variable,low,high,action")
    _refuse_repeats(path, frame[VARIABLE])
    ranges = {}
    for row in frame.iter_rows(named=True):
        try:
            low, high = (
                float(row[name]) if row[name] else sign * math.inf for name, sign in (("low", -1), ("high", 1))
            )
        except ValueError:
            low, high = math.nan, math.nan
        action = row.get("action") or "reject"
        if not (low <= high and low <= FLOAT32_MAX and high >= -FLOAT32_MAX) or action not in ACTIONS:
            raise UserError(
                f"{path}: the row of {row[VARIABLE]!r} is no range; low and high are float32 numbers or empty, "
                f"low is not above high, action is {' or '.join(ACTIONS)}"
            )
        ranges[row[VARIABLE]] = Range(low=low, high=high, action=action)
    return ranges


def read_embeddings(path: Path, variables: Sequence[str]) -> npt.NDArray[np.float32]:
    """The vectors of ``variables``, from a CSV of ``Key`` and D numbers.

    Args:
        variables: the vocabulary's, padding and unknown first.

    Returns:
        [num_codes, D] float32; padding and unknown are zeros.

    Raises:
        UserError: unreadable, no ``Key``, a key twice, a variable without a vector, or one that is not all numbers.
    """
    frame = read_frame(path)
    key = pick_column(path, frame.columns, "Key", (), "a header Key,0,1,2 …")
    if frame.width == 1:
        raise UserError(f"{path}: no numbers beside the keys; add a column for each dimension")
    _refuse_repeats(path, frame[key])
    row_of = {name: row for row, name in enumerate(frame[key])}
    wanted = variables[FIRST_CODE:]
    missing = [variable for variable in wanted if variable not in row_of]
    if missing:
        raise UserError(f"{path}: no vector for variable {missing[0]!r} ({len(missing)} lack one); add a row for each")
    vectors = frame[[row_of[variable] for variable in wanted]].drop(key).cast(pl.Float32, strict=False).to_numpy()
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise UserError(f"{path}: the vector of variable {wanted[broken[0]]!r} is not all finite numbers; mend the row")
    return np.concatenate([np.zeros((FIRST_CODE, vectors.shape[1]), np.float32), vectors])


def _refuse_repeats(path: Path, names: pl.Series) -> None:
    repeated = names.filter(names.is_duplicated())
    if len(repeated):
        raise UserError(f"{path}: {repeated[0]!r} stands there {int((names == repeated[0]).sum())} times; keep one row")
