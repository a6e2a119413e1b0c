"""A Parquet file a patient: ``{train,valid,test}/<patient>.parquet`` with ``variable``, ``value``, ``minute``.

Beside the three folders may lie ``cached.csv`` (a vector a variable), ``stats.csv`` (mean and std of variables) and
``oc.csv`` (outcomes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from pipeline.prepare.sources.side_files import read_labels
from pipeline.prepare.sources.source import (
    FILE,
    UNREADABLE,
    Piece,
    RawRows,
    Source,
    check_splits,
    frame_of,
    group_files,
    number_rows,
    patient_ids,
    plain_column,
    unreadable,
)
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, SPLITS, VALUE, VARIABLE, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientFiles(Source):
    """The folder that holds the split folders.  The file's name is the patient: ``200001.0.parquet`` is 200001."""

    path: Path
    labels_file: Path | None = None
    label_column: str | None = None
    embeddings_file: Path | None = None
    name: str = "patient_files"

    @property
    def options(self) -> dict[str, object]:
        return {"label_column": self.label_column}

    def _files(self) -> list[Path]:
        files = [path for split in SPLITS for path in sorted((self.path / split).glob("*.parquet"))]
        if not files:
            raise UserError(
                f"{self.path}: no {{{','.join(SPLITS)}}}/<patient>.parquet here; name the folder above them"
            )
        return files

    def _beside(self, name: str, given: Path | None = None) -> Path | None:
        candidates = [given] if given else [self.path / name, self.path.absolute().parent / name]
        return next((path for path in candidates if given or path.is_file()), None)

    def inputs(self) -> list[Path]:
        beside = (self._beside("oc.csv", self.labels_file), self.statistics(), self.embeddings())
        return [*self._files(), *filter(None, beside)]

    def pieces(self) -> list[Piece]:
        return group_files([(path.relative_to(self.path).as_posix(), path.stat().st_size) for path in self._files()])

    def read(self, piece: Piece) -> RawRows:
        ids = _patients_of(piece.files)
        frames = [self._read_file(name, number) for number, name in enumerate(piece.files)]
        for name, frame in zip(piece.files, frames, strict=True):
            if frame.columns != frames[0].columns:
                raise UserError(
                    f"{self.path / name}: column {SET_INDEX!r} is in some files only ({piece.files[0]} differs); "
                    "give it in all files, or in none"
                )
        rows = pl.concat(frames, how="vertical_relaxed")
        rows = rows.with_columns(pl.Series(PATIENT_ID, ids, dtype=pl.String).gather(rows[FILE]))
        return RawRows(rows=rows, patients=tuple(ids))

    def _read_file(self, name: str, number: int) -> pl.DataFrame:
        path = self.path / name
        wanted = [MINUTE, VARIABLE, VALUE]
        try:
            with pq.ParquetFile(path) as file:  # a third of the time of pl.read_parquet on so small a file
                names = file.schema_arrow.names
                missing = [column for column in wanted if column not in names]
                if missing:
                    raise UserError(f"{path}: no column {missing[0]!r}; it needs {', '.join(wanted)}")
                wanted += [SET_INDEX] * (SET_INDEX in names)
                table = file.read(columns=wanted, use_threads=False)
            frame = frame_of(table)
        except UNREADABLE as error:
            raise unreadable(path, error) from None
        return number_rows({column: plain_column(path, column, frame[column]) for column in wanted}, file=number)

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        outcomes = self._beside("oc.csv", self.labels_file)
        return None if outcomes is None else (str(outcomes), read_labels(outcomes, self.label_column))

    def splits(self) -> pl.DataFrame | None:
        files = self._files()
        patients = {split: _patients_of([path.name for path in files if path.parent.name == split]) for split in SPLITS}
        return check_splits(patients, self.path)

    def statistics(self) -> Path | None:
        return self._beside("stats.csv")

    def embeddings(self) -> Path | None:
        return self._beside("cached.csv", self.embeddings_file)


def _patients_of(names: tuple[str, ...] | list[str]) -> list[str]:
    return patient_ids(
        pl.Series([Path(name).name.removesuffix(".parquet") for name in names], dtype=pl.String)
    ).to_list()
