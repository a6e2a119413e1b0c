"""A Parquet file a patient: ``{train,valid,test}/<patient>.parquet`` with ``variable``, ``value``, ``minute``.

Beside the three folders may lie ``cached.csv`` (a vector a variable), ``stats.csv`` (mean and std of variables) and
``oc.csv`` (outcomes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import polars as pl

from pipeline.prepare.columns import MINUTES, NAMES, NUMBERS, check, to_numbers, to_patient_names, to_times
from pipeline.prepare.sources.listing import Listing, is_hidden
from pipeline.prepare.sources.reading import (
    FILE,
    SPLIT,
    Piece,
    concat_alike,
    number_rows,
    pick_column,
    read_parquet,
)
from pipeline.prepare.sources.source import GivenSplits, RawRows, Source
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, SPLITS, VALUE, VARIABLE

TIME: Final = "time"
IS_CARRY: Final = "is_carry"
"""Column of the original project's later files: whether a row repeats an earlier one, which is no event."""

SIDE_FILES: Final = {"labels": "oc.csv", "statistics": "stats.csv", "embeddings": "cached.csv"}


@dataclass(frozen=True, kw_only=True)
class PatientFiles(Source):
    """The folder that holds the split folders.  The file's name is the patient: ``200001.0.parquet`` is 200001."""

    name: ClassVar[str] = "patient_files"
    wanted: ClassVar[str] = f"{{{','.join(SPLITS)}}}/<patient>.parquet here; name the folder above them"
    files_are_patients: ClassVar[bool] = True

    def list_events(self) -> Listing:
        files = [path for split in SPLITS for path in sorted((self.path / split).glob("*.parquet"))]
        hidden = [path for path in files if is_hidden(path.relative_to(self.path))]
        return Listing([path for path in files if path not in set(hidden)], hidden)

    def find_side_files(self) -> dict[str, Path | None]:
        given = super().find_side_files()
        found = {}
        for role, name in SIDE_FILES.items():
            paths = (self.path / name, self.path.absolute().parent / name)
            found[role] = given.get(role) or next((path for path in paths if path.is_file()), None)
        return found

    def read(self, piece: Piece) -> Iterator[RawRows]:
        patients = _to_patients(piece.files)
        frames = [self._read_file(piece, number) for number in range(len(piece.files))]
        others = tuple(patients)
        for rows in concat_alike(frames):
            rows = rows.with_columns(patients.gather(rows[FILE]))
            rules = (("carried_forward", pl.col(IS_CARRY) == 1),) if IS_CARRY in rows.columns else ()
            time = to_times(rows[MINUTE], are_numbers_minutes=True).alias(TIME)
            yield RawRows(rows=rows.with_columns(time), minute=pl.col(TIME), rules=rules, patients=others)
            others = ()

    def _read_file(self, piece: Piece, number: int) -> pl.DataFrame:
        path = self.path / piece.files[number]
        frame, _ = read_parquet(path, piece, (VARIABLE, VALUE), [MINUTE, TIME, SET_INDEX, IS_CARRY])
        time = pick_column(path, frame.columns, None, (MINUTE, TIME), "one of these headers")
        series = {
            MINUTE: _check_time(path, frame[time]),
            VALUE: check(path, frame[VALUE], NUMBERS),
            VARIABLE: check(path, frame[VARIABLE], NAMES),
        }
        if SET_INDEX in frame.columns:
            series[SET_INDEX] = check(path, frame[SET_INDEX], NUMBERS)
        if IS_CARRY in frame.columns:
            series[IS_CARRY] = to_numbers(frame[IS_CARRY])
        return number_rows(series, file=number)

    def read_splits(self) -> GivenSplits:
        names = list(self.find_events())
        splits = pl.Series(SPLIT, [name.partition("/")[0] for name in names], dtype=pl.String)
        return GivenSplits(self.path, lambda: iter([pl.DataFrame([_to_patients(names), splits])]))


def _to_patients(names: Iterable[str]) -> pl.Series:
    stems = [Path(name).name.removesuffix(".parquet") for name in names]
    return to_patient_names(pl.Series(PATIENT_ID, stems, dtype=pl.String))


def _check_time(path: Path, column: pl.Series) -> pl.Series:
    """Return minutes, as numbers or durations, or instants."""
    return column if column.dtype == pl.Datetime else check(path, column, MINUTES)
