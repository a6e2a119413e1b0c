"""A Parquet file a patient: ``{train,valid,test}/<patient>.parquet`` with ``variable``, ``value``, ``minute``.

Beside the three folders may lie ``cached.csv`` (a vector a variable), ``stats.csv`` (mean and std of variables) and
``oc.csv`` (outcomes).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import polars as pl

from pipeline.prepare.sources.reading import (
    FILE,
    Piece,
    concat_files,
    number_rows,
    read_parquet,
    to_patient_ids,
    to_plain_column,
)
from pipeline.prepare.sources.source import RawRows, Source, check_splits
from pipeline.schema import MINUTE, SET_INDEX, SPLITS, VALUE, VARIABLE

SIDE_FILES: Final = {"labels": "oc.csv", "statistics": "stats.csv", "embeddings": "cached.csv"}


@dataclass(frozen=True, kw_only=True)
class PatientFiles(Source):
    """The folder that holds the split folders.  The file's name is the patient: ``200001.0.parquet`` is 200001."""

    name: ClassVar[str] = "patient_files"

    def find_events(self) -> dict[str, Path]:
        files = [path for split in SPLITS for path in sorted((self.path / split).glob("*.parquet"))]
        return self.name_files(files, f"{{{','.join(SPLITS)}}}/<patient>.parquet here; name the folder above them")

    def find_side_files(self) -> dict[str, Path | None]:
        given = super().find_side_files()
        found = {}
        for role, name in SIDE_FILES.items():
            paths = (self.path / name, self.path.absolute().parent / name)
            found[role] = given.get(role) or next((path for path in paths if path.is_file()), None)
        return found

    def read(self, piece: Piece) -> RawRows:
        patients = _to_patients(piece.files)
        rows = concat_files(self.path, piece, [self._read_file(piece, number) for number in range(len(piece.files))])
        rows = rows.with_columns(patients.gather(rows[FILE]))
        return RawRows(rows=rows, patients=tuple(patients))

    def _read_file(self, piece: Piece, number: int) -> pl.DataFrame:
        path = self.path / piece.files[number]
        frame, _ = read_parquet(path, piece, (MINUTE, VARIABLE, VALUE), [SET_INDEX])
        columns = {name: to_plain_column(path, name, frame[name]) for name in sorted(frame.columns)}
        return number_rows(columns, file=number)

    def read_splits(self) -> pl.DataFrame | None:
        names = list(self.find_events())
        return check_splits(self.path, _to_patients(names), pl.Series([name.partition("/")[0] for name in names]))


def _to_patients(names: Iterable[str]) -> pl.Series:
    return to_patient_ids(pl.Series([Path(name).name.removesuffix(".parquet") for name in names], dtype=pl.String))
