"""Long event tables: Parquet and CSV (also gzipped) with a row an event, columns mapped by flags."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import polars as pl
import pyarrow.parquet as pq

from pipeline.options import Section, option
from pipeline.prepare.sources.csv_pieces import cut_csv
from pipeline.prepare.sources.reading import (
    MICROSECONDS,
    PIECE_BYTES,
    Piece,
    concat_files,
    cut_files,
    number_rows,
    pick_column,
    read_parquet,
    reading,
    to_patient_ids,
    to_plain_column,
    to_utc,
)
from pipeline.prepare.sources.side_files import ID_COLUMNS, separator_of
from pipeline.prepare.sources.source import RawRows, Source
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE, UserError

SUFFIXES: Final = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
VARIABLE_COLUMNS: Final = ("variable", "code", "itemid")
VALUE_COLUMNS: Final = ("value", "valuenum", "numeric_value")
MINUTE_COLUMNS: Final = ("minute", "minutes")
TIME_COLUMNS: Final = ("time", "charttime", "timestamp")

TIME: Final = "time"
ORIGIN: Final = "origin"
ISO_DATE: Final = r"^\d{4}-\d{2}-\d{2}"


def is_table(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.is_file()


@dataclass(frozen=True, kw_only=True)
class TableOptions(Section):
    """Options of --format table; without them columns are found by their usual names."""

    patient_column: str | None = option(None, "Column of the patient.")
    minute_column: str | None = option(None, "Column of minutes since the patient's time origin.")
    time_column: str | None = option(None, "Column of dates with time, used instead of minutes.")
    origin_column: str | None = option(None, "Column of dates from which minutes count, instead of the first event.")
    variable_column: str | None = option(None, "Column of the variable.")
    value_column: str | None = option(None, "Column of the value.")
    set_column: str | None = option(None, "Column of the set's number in the patient; else a set is a minute.")


@dataclass(frozen=True, kw_only=True)
class Table(Source, TableOptions):
    """One file, all files of a folder and its folders, or the files of a glob pattern."""

    name: ClassVar[str] = "table"

    @property
    def base(self) -> Path:
        base = self.path
        while glob.has_magic(str(base)) and not base.exists():
            base = base.parent
        return base.parent if base.is_file() else base

    def find_events(self) -> dict[str, Path]:
        if self.path.is_file() and not is_table(self.path):
            raise UserError(f"{self.path}: not a table; give {', '.join(SUFFIXES)}")
        found: Iterable[Path] = self.path.rglob("*") if self.path.is_dir() else [self.path]
        if not self.path.exists():
            found = map(Path, glob.iglob(str(self.path), recursive=True))
        others = {path.resolve() for path in (self.labels, self.embeddings) if path}
        files = sorted(path for path in found if is_table(path) and path.resolve() not in others)
        return self.name_files(files, f"files {', '.join(SUFFIXES)} here; name a file, a folder or a pattern")

    def pieces(self) -> list[Piece]:
        files = self.find_events()
        texts = {name: path for name, path in files.items() if path.suffix in (".csv", ".tsv")}
        large = [name for name, path in texts.items() if path.stat().st_size > PIECE_BYTES]
        whole = cut_files({name: path for name, path in files.items() if name not in large})
        return whole + [piece for name in large for piece in cut_csv(files[name], name)]

    def read(self, piece: Piece) -> RawRows:
        base = self.base
        frames = [self._read_file(base / name, piece, number) for number, name in enumerate(piece.files)]
        rows = concat_files(base, piece, frames)
        rows = rows.with_columns(to_patient_ids(rows[PATIENT_ID]))
        if TIME not in rows.columns:
            return RawRows(rows=rows)
        minute = self._to_instants(rows[TIME])
        if ORIGIN in rows.columns:
            minute = (minute - self._to_instants(rows[ORIGIN])).dt.total_microseconds() / MICROSECONDS
        rows = rows.rename({TIME: MINUTE})  # rejects show times as they came
        return RawRows(rows=rows.with_columns(minute.alias(TIME)), minute=pl.col(TIME))

    def _read_file(self, path: Path, piece: Piece, number: int) -> pl.DataFrame:
        """Return ``file``, ``row`` and the file's columns by their roles."""
        columns = self._pick_columns(path, _read_column_names(path))
        frame, first = _read_columns(path, list(dict.fromkeys(columns.values())), piece)
        series = {
            role: to_plain_column(path, column, frame[column], instants=role in (TIME, ORIGIN))
            for role, column in columns.items()
        }
        return number_rows(series, file=number, first=first)

    def _pick_columns(self, path: Path, names: list[str]) -> dict[str, str]:
        """Return the file's columns by their roles."""

        def pick(flag: str, known: tuple[str, ...]) -> str:
            return pick_column(path, names, getattr(self, flag), known, f"--{flag}")

        columns = {PATIENT_ID: pick("patient_column", ID_COLUMNS), VARIABLE: pick("variable_column", VARIABLE_COLUMNS)}
        columns[VALUE] = pick("value_column", VALUE_COLUMNS)
        if self.time_column or not (self.minute_column or any(name in names for name in MINUTE_COLUMNS)):
            known = (*MINUTE_COLUMNS, *TIME_COLUMNS)
            columns[TIME] = pick_column(path, names, self.time_column, known, "--minute_column or --time_column")
            if self.origin_column:
                columns[ORIGIN] = pick("origin_column", ())
        else:
            columns[MINUTE] = pick("minute_column", MINUTE_COLUMNS)
        if self.set_column or SET_INDEX in names:
            columns[SET_INDEX] = pick("set_column", (SET_INDEX,))
        return columns

    def _to_instants(self, column: pl.Series) -> pl.Series:
        """Return ``Datetime("us")`` in UTC; null where the column holds none.

        Text must be ISO 8601, so that no day passes for a month.
        """
        if column.dtype == pl.String:
            text = column.str.strip_chars()
            text = text.set(~text.str.contains(ISO_DATE).fill_null(False), None)
            if text.null_count() == len(text):
                return pl.Series([None] * len(text), dtype=pl.Datetime("us"))
            column = text.str.to_datetime(time_unit="us", strict=False)
        elif not isinstance(column.dtype, pl.Datetime | pl.Date | pl.Null):
            found = f"the time column holds {column.dtype}, no dates"
            raise UserError(f"{self.path}: {found}; if it holds minutes, use --minute_column")
        return to_utc(column)


def _read_column_names(path: Path) -> list[str]:
    with reading(path):
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        return pl.read_csv(path, n_rows=0, infer_schema=False, separator=separator_of(path), glob=False).columns


def _read_columns(path: Path, columns: list[str], piece: Piece) -> tuple[pl.DataFrame, int]:
    if path.suffix == ".parquet":
        return read_parquet(path, piece, columns)
    separator = separator_of(path)
    with reading(path):
        if not piece.stop:
            return pl.read_csv(path, columns=columns, infer_schema=False, separator=separator, glob=False), 1
        names = _read_column_names(path)
        position = {str(names.index(column)): column for column in columns}
        content = _read_range(path, piece, separator.join(map(str, range(len(names)))))
        frame = pl.read_csv(content, columns=list(position), infer_schema=False, separator=separator)
        return frame.rename(position), piece.first_row


def _read_range(path: Path, piece: Piece, header: str) -> bytes:
    """Return the rows of a range of bytes, below ``header`` instead of the file's own header."""
    with path.open("rb") as file:
        file.seek(piece.start)
        if not piece.start:
            file.readline()
        return header.encode() + b"\n" + file.read(piece.stop - file.tell())
