"""PhysioNet / Computing in Cardiology Challenge 2019: folders of ``p<number>.psv`` with a row an hour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import polars as pl

from pipeline.prepare.columns import to_minutes
from pipeline.prepare.sources.csv_files import UTF8, parse_rows, read_header
from pipeline.prepare.sources.labels import Labels, merge_samples, parse_labels
from pipeline.prepare.sources.layout import MINUTES_OF_UNIT
from pipeline.prepare.sources.listing import Listing, list_files
from pipeline.prepare.sources.reading import FILE, ROW, Piece, reading
from pipeline.prepare.sources.source import RawRows, Source
from pipeline.prepare.sources.wide import PREFIX, melt
from pipeline.schema import LABEL, MINUTE, PATIENT_ID, PREDICTION_MINUTE, VALUE, VARIABLE, UserError

CLOCK: Final = "ICULOS"
"""Hours since admission to intensive care."""

STATIC: Final = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime")
"""Columns that say the same in each row of a patient."""

LABELS: Final = "SepsisLabel"
"""1 from six hours before the onset of sepsis; the label of a sample an hour, and never a variable."""

TIME: Final = "time"


def is_hourly_record(path: Path) -> bool:
    return path.suffix == ".psv"


def is_physionet2019(path: Path) -> bool:
    """Return whether a folder holds hourly records with the clock of the challenge."""
    first = list_files(path, is_hourly_record).files[:1]
    try:
        return bool(first) and CLOCK in read_header(first[0], UTF8)
    except UserError:
        return False


@dataclass(frozen=True, kw_only=True)
class PhysioNet2019(Source):
    """Record files of a folder and its folders.  The file's name is the patient."""

    name: ClassVar[str] = "physionet2019"
    files_are_patients: ClassVar[bool] = True

    def list_events(self) -> Listing:
        return list_files(self.path, is_hourly_record)

    def find_events(self) -> dict[str, Path]:
        return self.name_files(self.list_events().files, "record files (*.psv) here; name the folder that holds them")

    def read(self, piece: Piece) -> Iterator[RawRows]:
        patients = [Path(name).stem for name in piece.files]
        header, rows = self._read_records(piece)
        rows = rows.with_columns(pl.Series(PATIENT_ID, patients).gather(rows[FILE]))
        hours = rows.rename({CLOCK: MINUTE}).with_columns(to_minutes(rows[CLOCK], MINUTES_OF_UNIT["hours"]).alias(TIME))
        hourly = [name for name in header if name not in (*STATIC, CLOCK, LABELS)]
        static = [name for name in STATIC if name in header]
        once = rows.unique([FILE, *static], keep="first", maintain_order=True).with_columns(
            pl.lit(None, pl.String).alias(MINUTE), pl.lit(None, pl.Datetime("us")).alias(TIME)
        )
        others, columns = tuple(patients), {MINUTE: CLOCK}
        for part, names, is_static in ((hours, hourly, False), (once, static, True)):
            wide = part.select(
                FILE, ROW, PATIENT_ID, MINUTE, TIME, *(pl.col(name).alias(PREFIX + name) for name in names)
            )
            for events, num_rows in melt(wide):
                if is_static:
                    events = events.unique([FILE, VARIABLE, VALUE], keep="first", maintain_order=True)
                yield RawRows(
                    rows=events,
                    minute=pl.col(TIME),
                    static=is_static,
                    patients=others,
                    num_source_rows=0 if is_static else num_rows,
                    columns=columns,
                )
                others = ()

    def read_labels(self) -> Labels | None:
        """Return the labels of ``--labels``, else a sample an hour: ``SepsisLabel`` at the minute of ``ICULOS``."""
        if self.labels is not None:
            return super().read_labels()
        frames = [frame for piece in self.pieces() for frame in self._read_hourly_labels(piece)]
        return Labels(f"{self.path}: {LABELS}", pl.concat(frames)) if frames else None

    def _read_hourly_labels(self, piece: Piece) -> Iterator[pl.DataFrame]:
        """Yield the samples of a piece whose records have labels; a row without its hour is none."""
        header, rows = self._read_records(piece, [CLOCK, LABELS])
        if LABELS not in header:
            return
        patients = pl.Series([Path(name).stem for name in piece.files])
        minutes = to_minutes(rows[CLOCK], MINUTES_OF_UNIT["hours"]).alias(PREDICTION_MINUTE)
        rows = rows.select(FILE, patients.gather(rows[FILE]).alias(PATIENT_ID), minutes, LABELS)

        def merge(file: int, part: pl.DataFrame) -> pl.DataFrame:
            path = self.path / piece.files[file]
            part = part.with_columns(parse_labels(path, part[LABELS]).alias(LABEL)).drop(FILE, LABELS)
            return merge_samples(path, part.filter(pl.col(PREDICTION_MINUTE).is_finite()))

        try:
            yield merge(0, rows)
        except UserError:  # of which file and row?
            for (file,), part in rows.group_by(FILE, maintain_order=True):
                merge(int(str(file)), part)
            raise

    def _read_records(self, piece: Piece, wanted: Sequence[str] = ()) -> tuple[list[str], pl.DataFrame]:
        """Return the header of all files, and their rows: ``file``, ``row`` and all columns, or those ``wanted``."""
        bodies: list[bytes] = []
        header: bytes = b""
        for name in piece.files:
            path = self.path / name
            with reading(path):
                content = path.read_bytes().replace(b"\r\n", b"\n")
                content.decode()
            first, _, body = content.partition(b"\n")
            header = header or first
            names = [name.strip() for name in first.decode().split("|")]
            if first != header or CLOCK not in names or len(set(names)) < len(names):
                other = f"that of the first file, or one with {CLOCK} and each column once"
                raise UserError(f"{path}: its header is not {other}; leave the file out if it is no record")
            bodies.append(body.rstrip(b"\n") + b"\n" if body.strip() else b"")
        columns = [name for name in names if not wanted or name in wanted]
        rows = parse_rows(self.path, b"".join(bodies), 1, names, columns, "|")
        num_rows = [body.count(b"\n") for body in bodies]
        if rows.height != sum(num_rows):
            raise UserError(f"{self.path}: {piece.files[0]} or a file after it holds a quote; write records without")
        file = np.repeat(np.arange(len(bodies), dtype=np.uint32), num_rows)
        first_row = np.cumsum([0, *num_rows[:-1]])
        number = np.arange(1, rows.height + 1) - first_row[file]
        return names, rows.select(pl.Series(FILE, file), pl.Series(ROW, number, dtype=pl.Int64), *columns)
