"""Long event tables: Parquet and CSV (also gzipped) with a row an event, columns mapped by flags."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl

from pipeline.prepare.sources.csv_pieces import csv_pieces
from pipeline.prepare.sources.side_files import ID_COLUMNS, pick_column, read_labels
from pipeline.prepare.sources.source import (
    MICROSECONDS,
    PIECE_BYTES,
    Piece,
    RawRows,
    Source,
    file_pieces,
    number_rows,
    parquet_columns,
    patient_ids,
    plain_column,
    read_parquet,
    unreadable,
    utc,
)
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE, UserError

SUFFIXES: Final = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
VARIABLE_COLUMNS: Final = ("variable", "code", "itemid")
VALUE_COLUMNS: Final = ("value", "valuenum", "numeric_value")
MINUTE_COLUMNS: Final = ("minute", "minutes")
TIME_COLUMNS: Final = ("time", "charttime", "timestamp")

TIME: Final = "time"
ORIGIN: Final = "origin"
RAW_NAMES: Final = {TIME: MINUTE}
"""Instants stand in the rows where minutes would, so that rejects show them as they came."""

ISO_DATE: Final = r"^\d{4}-\d{2}-\d{2}"


def is_table(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.is_file()


@dataclass(frozen=True, kw_only=True, slots=True)
class Table(Source):
    """One file, all files of a folder and its folders, or a glob pattern; columns not named are found by usual names.

    Attributes:
        minute_column: minutes from the patient's time origin.
        time_column: dates with time instead; minutes count from ``origin_column``, or from the patient's first event.
        set_column: number of the set within the patient; left out, a set is a minute.
    """

    path: Path
    patient_column: str | None = None
    minute_column: str | None = None
    time_column: str | None = None
    origin_column: str | None = None
    variable_column: str | None = None
    value_column: str | None = None
    set_column: str | None = None
    labels_file: Path | None = None
    label_column: str | None = None
    embeddings_file: Path | None = None
    name: str = "table"

    @property
    def options(self) -> dict[str, object]:
        names = ("patient", "minute", "time", "origin", "variable", "value", "set", "label")
        return {f"{name}_column": getattr(self, f"{name}_column") for name in names}

    @property
    def _base(self) -> Path:
        """The folder that names in rejects are relative to."""
        base = self.path
        while glob.has_magic(str(base)) and not base.exists():
            base = base.parent
        return base.parent if base.is_file() else base

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            found: Iterable[Path] = self.path.rglob("*")
        elif self.path.exists():
            if not is_table(self.path):
                raise UserError(f"{self.path}: not a table; give {', '.join(SUFFIXES)}")
            found = [self.path]
        else:
            found = map(Path, glob.iglob(str(self.path), recursive=True))
        others = {path.resolve() for path in (self.labels_file, self.embeddings_file) if path}
        files = sorted(path for path in found if is_table(path) and path.resolve() not in others)
        if not files:
            raise UserError(f"{self.path}: no files {', '.join(SUFFIXES)} here; name a file, a folder or a pattern")
        return files

    def inputs(self) -> list[Path]:
        return [*self._files(), *filter(None, [self.labels_file, self.embeddings_file])]

    def pieces(self) -> list[Piece]:
        names = {path: path.relative_to(self._base).as_posix() for path in self._files()}
        large = [path for path in names if path.suffix in (".csv", ".tsv") and path.stat().st_size > PIECE_BYTES]
        whole = file_pieces([(path, name) for path, name in names.items() if path not in large])
        return whole + [piece for path in large for piece in csv_pieces(path, names[path])]

    def read(self, piece: Piece) -> RawRows:
        columns: list[dict[str, str]] = []
        frames: list[pl.DataFrame] = []
        for number, name in enumerate(piece.files):
            path = self._base / name
            columns.append(self._columns(path, _column_names(path)))
            if columns[-1].keys() != columns[0].keys():
                raise UserError(
                    f"{path}: holds {', '.join(columns[-1])}, {piece.files[0]} {', '.join(columns[0])}; "
                    "prepare alike files together"
                )
            frame, first = _read_columns(path, list(dict.fromkeys(columns[-1].values())), piece)
            series = {
                RAW_NAMES.get(role, role): plain_column(path, column, frame[column], instants=role in (TIME, ORIGIN))
                for role, column in columns[-1].items()
            }
            frames.append(number_rows(series, file=number, first=first))
        try:
            rows = pl.concat(frames, how="vertical_relaxed")
        except pl.exceptions.PolarsError as error:
            raise UserError(
                f"{self._base}: {piece.files[0]} and others differ in dtype ({error}); make them alike"
            ) from None
        rows = rows.with_columns(patient_ids(rows[PATIENT_ID]))
        if TIME not in columns[0]:
            return RawRows(rows=rows)
        instant = self._instants(rows[MINUTE])
        if ORIGIN not in columns[0]:
            return RawRows(rows=rows.with_columns(instant.alias(TIME)), minute=pl.col(TIME))
        since = (instant - self._instants(rows[ORIGIN])).dt.total_microseconds() / MICROSECONDS
        return RawRows(rows=rows.with_columns(since.alias(TIME)), minute=pl.col(TIME))

    def _columns(self, path: Path, names: list[str]) -> dict[str, str]:
        """The file's columns by what they are."""
        columns = {
            PATIENT_ID: pick_column(path, names, self.patient_column, ID_COLUMNS, "--patient_column"),
            VARIABLE: pick_column(path, names, self.variable_column, VARIABLE_COLUMNS, "--variable_column"),
            VALUE: pick_column(path, names, self.value_column, VALUE_COLUMNS, "--value_column"),
        }
        if self.time_column or not (self.minute_column or any(name in names for name in MINUTE_COLUMNS)):
            known = () if self.time_column else (*MINUTE_COLUMNS, *TIME_COLUMNS)
            columns[TIME] = pick_column(path, names, self.time_column, known, "--minute_column or --time_column")
            if self.origin_column:
                columns[ORIGIN] = pick_column(path, names, self.origin_column, (), "--origin_column")
        else:
            columns[MINUTE] = pick_column(path, names, self.minute_column, MINUTE_COLUMNS, "--minute_column")
        if self.set_column or SET_INDEX in names:
            columns[SET_INDEX] = pick_column(path, names, self.set_column, (SET_INDEX,), "--set_column")
        return columns

    def _instants(self, column: pl.Series) -> pl.Series:
        """``Datetime("us")`` in UTC; null where the column holds none.

        Text must be ISO 8601, so that no day passes for a month.
        """
        if column.dtype == pl.String:
            text = column.str.strip_chars()
            text = text.set(~text.str.contains(ISO_DATE).fill_null(False), None)
            if text.null_count() == len(text):
                return pl.Series([None] * len(text), dtype=pl.Datetime("us"))
            column = text.str.to_datetime(time_unit="us", strict=False)
        elif not isinstance(column.dtype, pl.Datetime | pl.Date | pl.Null):
            raise UserError(
                f"{self.path}: the time column holds {column.dtype}, no dates; if it holds minutes, use --minute_column"
            )
        return utc(column)

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        if self.labels_file is None:
            return None
        return str(self.labels_file), read_labels(self.labels_file, self.label_column, self.patient_column)

    def embeddings(self) -> Path | None:
        return self.embeddings_file


def _separator(path: Path) -> str:
    return "\t" if ".tsv" in path.suffixes else ","


def _column_names(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return parquet_columns(path)
    try:
        return pl.read_csv(path, n_rows=0, infer_schema=False, separator=_separator(path), glob=False).columns
    except (OSError, pl.exceptions.PolarsError) as error:
        raise unreadable(path, error) from None


def _read_columns(path: Path, columns: list[str], piece: Piece) -> tuple[pl.DataFrame, int]:
    if path.suffix == ".parquet":
        return read_parquet(path, piece, columns)
    separator = _separator(path)
    try:
        if not piece.stop:
            frame = pl.read_csv(path, columns=columns, infer_schema=False, separator=separator, glob=False)
        else:
            names = _column_names(path)
            place = {str(names.index(column)): column for column in columns}
            content = _read_range(path, piece, separator.join(map(str, range(len(names)))))
            frame = pl.read_csv(content, columns=list(place), infer_schema=False, separator=separator).rename(place)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise unreadable(path, error) from None
    return frame, piece.first_row


def _read_range(path: Path, piece: Piece, header: str) -> bytes:
    """The rows of a range of bytes, below ``header`` instead of the file's own."""
    with path.open("rb") as file:
        file.seek(piece.start)
        if not piece.start:
            file.readline()
        return header.encode() + b"\n" + file.read(piece.stop - file.tell())
