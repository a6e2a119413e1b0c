"""PhysioNet / Computing in Cardiology Challenge 2012: a folder of ``<RecordID>.txt`` with ``Time,Parameter,Value``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import polars as pl

from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.labels import Labels, read_label_files
from pipeline.prepare.sources.listing import FileTest, list_files
from pipeline.prepare.sources.reading import FILE, ROW, Piece
from pipeline.prepare.sources.records import Records, name_patients
from pipeline.prepare.sources.source import RawRows
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE, UserError

HEADER: Final = "Time,Parameter,Value"

_CLOCK = pl.col(MINUTE).str.splitn(":", 2)
_HOURS = _CLOCK.struct.field("field_0").cast(pl.UInt32, strict=False)
_MINUTES = _CLOCK.struct.field("field_1").cast(pl.UInt32, strict=False)
CLOCK_MINUTE: Final = pl.when(_MINUTES < 60).then(_HOURS * 60.0 + _MINUTES)
"""Minutes of ``HH:MM`` since admission, the hours up to 48."""

_IS_MISSING_CODE = pl.col(VALUE).cast(pl.Float64, strict=False) == -1
RULES: Final = (
    ("record_id", pl.col(VARIABLE) == "RecordID"),
    ("missing_code", pl.col(VARIABLE).is_in(["Gender", "Height", "Weight"]) & _IS_MISSING_CODE),
)


def is_record(path: Path) -> bool:
    return path.suffix == ".txt" and path.stem.isascii() and path.stem.isdecimal()


@dataclass(frozen=True, kw_only=True)
class PhysioNet2012(Records):
    """Record files of a folder and its folders; outcomes come from ``labels``, or from files ``Outcomes-*.txt``.

    These lie in the folder, in its folders, or beside it: then ``Outcomes-a.txt`` is that of ``set-a``.

    The first row of a record names the RecordID again; the file's name is the patient.
    """

    name: ClassVar[str] = "physionet2012"
    wanted: ClassVar[str] = "record files (<RecordID>.txt) here; name the folder that holds them"
    is_record: ClassVar[FileTest] = staticmethod(is_record)

    def find_side_files(self) -> dict[str, Path | None]:
        outcomes = [self.labels] if self.labels else self._find_outcomes()
        found = {"labels" if not number else f"labels {number}": path for number, path in enumerate(outcomes)}
        return super().find_side_files() | found

    def read_labels(self, hide: Hide | None = None) -> Labels | None:
        paths = [path for role, path in self.find_side_files().items() if role.startswith("labels") and path]
        if not paths:
            return None
        return read_label_files(paths, " and ".join(map(str, paths)), self.label_columns, hide)

    def _find_outcomes(self) -> list[Path]:
        inside = list_files(self.path, lambda path: path.match("Outcomes-*.txt")).files
        if inside:
            return inside
        parent = self.path.absolute().parent
        outcomes = sorted(parent.glob("Outcomes-*.txt"))
        suffix = self.path.name.removeprefix("set-")
        outcomes = [path for path in outcomes if path.stem.removeprefix("Outcomes-") == suffix] or outcomes
        if len(outcomes) > 1:
            raise UserError(f"{parent}: {len(outcomes)} files Outcomes-*.txt; name the right one with --labels")
        return outcomes

    def read(self, piece: Piece) -> Iterator[RawRows]:
        rows = self.read_records(piece)
        self._check_record_ids(piece, rows)
        yield RawRows(rows=rows, minute=CLOCK_MINUTE, rules=RULES, patients=tuple(name_patients(piece)))

    def check_header(self, path: Path, header: str, first: str) -> None:
        if header != HEADER:
            raise UserError(f"{path}: the first line is not {HEADER}; leave the file out if it is no record")

    def parse_rows(self, header: str, content: bytes, wanted: Sequence[str]) -> pl.DataFrame:
        # A row of three fields goes first, and away again: Polars refuses a file whose first row has fewer.
        schema = dict.fromkeys((MINUTE, VARIABLE, VALUE), pl.String)
        content = b",,\n" + content
        rows = pl.read_csv(content, has_header=False, schema=schema, quote_char=None, truncate_ragged_lines=True)
        return rows.slice(1)

    def _check_record_ids(self, piece: Piece, rows: pl.DataFrame) -> None:
        """Refuse a copied or renamed record, which would put one patient into two splits."""
        other = rows.filter(pl.col(VARIABLE) == "RecordID", pl.col(VALUE) != pl.col(PATIENT_ID))
        if other.height:
            path, row = self.path / piece.files[other[FILE][0]], other[ROW][0]
            raise UserError(f"{path}: row {row} has another RecordID; name the file like its record, or leave it out")
