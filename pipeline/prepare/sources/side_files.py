"""Read the files that are neither events nor labels: statistics, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare.columns import to_variable_names
from pipeline.prepare.sources.reading import pick_column, reading
from pipeline.schema import FIRST_CODE, VARIABLE, UserError

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
