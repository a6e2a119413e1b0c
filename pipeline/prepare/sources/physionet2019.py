"""PhysioNet / Computing in Cardiology Challenge 2019: folders of ``p<number>.psv`` with a row an hour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import polars as pl

from pipeline.prepare.columns import to_minutes
from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.csv_files import UTF8, read_header
from pipeline.prepare.sources.csv_rows import parse_rows
from pipeline.prepare.sources.label_values import parse_labels
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.sources.layout import MINUTES_OF_UNIT
from pipeline.prepare.sources.listing import FileTest, list_files
from pipeline.prepare.sources.reading import FILE, ROW, Piece
from pipeline.prepare.sources.records import Records, name_patients
from pipeline.prepare.sources.source import RawRows
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
class PhysioNet2019(Records):
    """Record files of a folder and its folders.  The file's name is the patient."""

    name: ClassVar[str] = "physionet2019"
    wanted: ClassVar[str] = "record files (*.psv) here; name the folder that holds them"
    is_record: ClassVar[FileTest] = staticmethod(is_hourly_record)

    def read(self, piece: Piece) -> Iterator[RawRows]:
        rows = self.read_records(piece)
        header = rows.columns
        hours = rows.rename({CLOCK: MINUTE}).with_columns(to_minutes(rows[CLOCK], MINUTES_OF_UNIT["hours"]).alias(TIME))
        hourly = [name for name in header if name not in (FILE, ROW, PATIENT_ID, *STATIC, CLOCK, LABELS)]
        static = [name for name in STATIC if name in header]
        once = rows.unique([FILE, *static], keep="first", maintain_order=True).with_columns(
            pl.lit(None, pl.String).alias(MINUTE), pl.lit(None, pl.Datetime("us")).alias(TIME)
        )
        others, columns = tuple(name_patients(piece)), {MINUTE: CLOCK}
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

    def read_labels(self, hide: Hide | None = None) -> Labels | None:
        """Return the labels of ``--labels``, else a sample an hour: ``SepsisLabel`` at the minute of ``ICULOS``."""
        if self.labels is not None:
            return super().read_labels(hide)
        frames = [frame for piece in self.pieces() for frame in self._read_hourly_labels(piece)]
        return Labels.of_frame(f"{self.path}: {LABELS}", pl.concat(frames), hide=hide) if frames else None

    def _read_hourly_labels(self, piece: Piece) -> Iterator[pl.DataFrame]:
        """Yield the samples of a piece whose records have labels; a row without its hour is none."""
        rows = self.read_records(piece, [CLOCK, LABELS])
        if LABELS not in rows.columns:
            return
        minutes = to_minutes(rows[CLOCK], MINUTES_OF_UNIT["hours"]).alias(PREDICTION_MINUTE)
        rows = rows.select(FILE, PATIENT_ID, minutes, LABELS)

        def merge(file: int, part: pl.DataFrame) -> pl.DataFrame:
            path = self.path / piece.files[file]
            part = part.with_columns(parse_labels(path, LABELS, part[LABELS], "binary")).drop(FILE, LABELS)
            return _merge_samples(path, part.filter(pl.col(PREDICTION_MINUTE).is_finite()))

        try:
            yield merge(0, rows)
        except UserError:  # of which file and row?
            for (file,), part in rows.group_by(FILE, maintain_order=True):
                merge(int(str(file)), part)
            raise

    def check_header(self, path: Path, header: str, first: str) -> None:
        names = _split_header(header)
        if header != first or CLOCK not in names or len(set(names)) < len(names):
            other = f"that of the first file, or one with {CLOCK} and each column once"
            raise UserError(f"{path}: its header is not {other}; leave the file out if it is no record")

    def parse_rows(self, header: str, content: bytes, wanted: Sequence[str]) -> pl.DataFrame:
        names = _split_header(header)
        return parse_rows(self.path, content, 1, names, [name for name in names if not wanted or name in wanted], "|")


def _split_header(header: str) -> list[str]:
    return [name.strip() for name in header.split("|")]


def _merge_samples(path: Path, rows: pl.DataFrame) -> pl.DataFrame:
    """Return each sample of a record once; raise UserError where two labels of a sample contradict."""
    keys = [name for name in rows.columns if name != LABEL]
    merged = rows.group_by(keys).agg(pl.col(LABEL).min(), pl.col(LABEL).max().alias("max")).sort(keys)
    contradicting = merged.filter(pl.col(LABEL) != pl.col("max"))
    if contradicting.height:
        same = rows.select(keys).with_row_index("row").join(contradicting[:1].select(keys), on=keys, how="semi")
        first, last = (int(row) + 1 for row in (same["row"][0], same["row"][-1]))
        raise UserError(f"{path}: rows {first} to {last} give one sample two labels; keep one")
    return merged.drop("max")
