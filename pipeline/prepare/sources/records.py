"""Folders of small text files, a patient a file, as the PhysioNet challenges have them: read many as one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl

from pipeline.prepare.sources.listing import FileTest, Listing, list_files
from pipeline.prepare.sources.reading import FILE, ROW, Piece, reading
from pipeline.prepare.sources.source import Source
from pipeline.schema import PATIENT_ID, UserError


@dataclass(frozen=True, kw_only=True)
class Records(Source):
    """Record files of a folder and its folders.  The file's name is the patient."""

    files_are_patients: ClassVar[bool] = True
    is_record: ClassVar[FileTest]

    def list_events(self) -> Listing:
        return list_files(self.path, type(self).is_record)

    @abstractmethod
    def check_header(self, path: Path, header: str, first: str) -> None:
        """Raise UserError for the header of a record of another kind; ``first`` is that of the piece's first record."""

    @abstractmethod
    def parse_rows(self, header: str, content: bytes, wanted: Sequence[str]) -> pl.DataFrame:
        """Return the rows of records of one header, in order, as text: the ``wanted`` columns, or all."""

    def read_records(self, piece: Piece, wanted: Sequence[str] = ()) -> pl.DataFrame:
        """Return the rows of a piece's records: ``file``, ``row``, ``patient_id`` and columns as text.

        One parse of all files together is ten times as fast as one parse a file.
        """
        first, bodies = "", []
        for name in piece.files:
            path = self.path / name
            with reading(path):
                content = path.read_bytes()
                content.decode()
            header, _, body = content.replace(b"\r\n", b"\n").partition(b"\n")
            first = first or header.decode()
            self.check_header(path, header.decode(), first)
            body = body.rstrip(b"\n")
            bodies.append(body + b"\n" if body else b"")
        rows = self.parse_rows(first, b"".join(bodies), wanted)
        num_rows = [body.count(b"\n") for body in bodies]
        if rows.height != sum(num_rows):
            raise UserError(f"{self.path}: {piece.files[0]} or a file after it holds a quote; write records without")
        file = np.repeat(np.arange(len(bodies), dtype=np.uint32), num_rows)
        number = np.arange(1, rows.height + 1) - np.cumsum([0, *num_rows[:-1]])[file]
        patient = pl.Series(PATIENT_ID, name_patients(piece), dtype=pl.String).gather(file)
        return rows.select(pl.Series(FILE, file), pl.Series(ROW, number, dtype=pl.Int64), patient, *rows.columns)


def name_patients(piece: Piece) -> list[str]:
    """Return the patients of a piece's files."""
    return [Path(name).stem for name in piece.files]
