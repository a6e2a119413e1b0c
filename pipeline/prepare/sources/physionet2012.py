"""PhysioNet / Computing in Cardiology Challenge 2012: a folder of ``<RecordID>.txt`` with ``Time,Parameter,Value``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from pipeline.prepare.sources.side_files import read_labels
from pipeline.prepare.sources.source import FILE, ROW, Piece, RawRows, Source, group_files, unreadable
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE, UserError

HEADER: Final = b"Time,Parameter,Value\n"

_CLOCK = pl.col(MINUTE).str.splitn(":", 2)
_HOURS = _CLOCK.struct.field("field_0").cast(pl.UInt32, strict=False)
_MINUTES = _CLOCK.struct.field("field_1").cast(pl.UInt32, strict=False)
CLOCK_MINUTE: Final = pl.when(_MINUTES < 60).then(_HOURS * 60.0 + _MINUTES)
"""``HH:MM`` since admission, the hours up to 48."""

RULES: Final = (
    ("record_id", pl.col(VARIABLE) == "RecordID"),
    (
        "missing_code",
        pl.col(VARIABLE).is_in(["Gender", "Height", "Weight"]) & (pl.col(VALUE).cast(pl.Float64, strict=False) == -1),
    ),
)


def is_record(path: Path) -> bool:
    return path.suffix == ".txt" and path.stem.isascii() and path.stem.isdecimal()


@dataclass(frozen=True, kw_only=True, slots=True)
class PhysioNet2012(Source):
    """Record files of one folder; the outcomes from ``labels_file``, or from an ``Outcomes-*.txt`` in or beside it.

    Of several, that of the folder: ``Outcomes-a.txt`` for ``set-a``.

    The first row of a record names the RecordID again; the file's name is the patient.
    """

    path: Path
    labels_file: Path | None = None
    label_column: str | None = None
    embeddings_file: Path | None = None
    name: str = "physionet2012"

    @property
    def options(self) -> dict[str, object]:
        return {"label_column": self.label_column}

    def _records(self) -> list[Path]:
        records = sorted((path for path in self.path.iterdir() if is_record(path)), key=lambda path: path.name)
        if not records:
            raise UserError(f"{self.path}: no record files (<RecordID>.txt) here; name the folder that holds them")
        return records

    def _outcomes(self) -> Path | None:
        if self.labels_file is not None:
            return self.labels_file
        for folder in (self.path, self.path.absolute().parent):
            found = sorted(folder.glob("Outcomes-*.txt"))
            same = [
                path for path in found if path.stem.removeprefix("Outcomes-") == self.path.name.removeprefix("set-")
            ]
            found = same or found
            if len(found) > 1:
                raise UserError(f"{folder}: {len(found)} files Outcomes-*.txt; name the right one with --labels")
            if found:
                return found[0]
        return None

    def inputs(self) -> list[Path]:
        return [*self._records(), *filter(None, [self._outcomes(), self.embeddings_file])]

    def pieces(self) -> list[Piece]:
        return group_files([(path.name, path.stat().st_size) for path in self._records()])

    def read(self, piece: Piece) -> RawRows:
        bodies = [self._body(self.path / name) for name in piece.files]
        num_rows = [body.count(b"\n") for body in bodies]
        patients = [name.removesuffix(".txt") for name in piece.files]
        # One parse of all files together is ten times as fast as one parse a file.  A row of three fields goes first,
        # and away again: Polars refuses a file whose first row has fewer.
        rows = pl.read_csv(
            b"".join([b",,\n", *bodies]),
            has_header=False,
            schema={MINUTE: pl.String, VARIABLE: pl.String, VALUE: pl.String},
            quote_char=None,
            truncate_ragged_lines=True,
            raise_if_empty=False,
        )
        rows = rows.slice(1)
        assert rows.height == sum(num_rows), "a row a line"
        file = np.repeat(np.arange(len(bodies), dtype=np.uint32), num_rows)
        first = np.cumsum([0, *num_rows[:-1]])
        rows = rows.select(
            pl.Series(FILE, file),
            pl.Series(ROW, np.arange(1, rows.height + 1) - first[file]),
            pl.Series(PATIENT_ID, patients).gather(file),
            MINUTE,
            VARIABLE,
            VALUE,
        )
        self._check_record_ids(rows)
        return RawRows(rows=rows, minute=CLOCK_MINUTE, rules=RULES, patients=tuple(patients))

    @staticmethod
    def _body(path: Path) -> bytes:
        """The data rows, each ended by a line feed."""
        try:
            content = path.read_bytes()
            content.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(path, error) from None
        if b"\r" in content:
            content = content.replace(b"\r\n", b"\n")
        content = content.rstrip(b"\n") + b"\n"
        if not content.startswith(HEADER):
            raise UserError(
                f"{path}: the first line is not {HEADER.decode().strip()}; leave the file out if it is no record"
            )
        return content[len(HEADER) :]

    def _check_record_ids(self, rows: pl.DataFrame) -> None:
        """A copied or renamed record would put one patient into two splits."""
        other = rows.filter(pl.col(VARIABLE) == "RecordID", pl.col(VALUE) != pl.col(PATIENT_ID))
        if other.height:
            path, row = self.path / f"{other[PATIENT_ID][0]}.txt", other[ROW][0]
            raise UserError(f"{path}: row {row} has another RecordID; name the file like its record, or leave it out")

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        outcomes = self._outcomes()
        return None if outcomes is None else (str(outcomes), read_labels(outcomes, self.label_column))

    def embeddings(self) -> Path | None:
        return self.embeddings_file
