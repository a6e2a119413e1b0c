"""Event tables: long ones with a row an event, wide ones with a column a variable; Parquet, and CSV packed or not."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import polars as pl

from pipeline.machine import usable_cores
from pipeline.prepare import columns, names
from pipeline.prepare.clean import END_OF_TIME, NO_ORIGIN
from pipeline.prepare.sources import csv_files, layout
from pipeline.prepare.sources.csv_rows import parse_numbers, parse_rows
from pipeline.prepare.sources.layout import MINUTES_OF_UNIT, ORIGIN, TIME, TableLayout
from pipeline.prepare.sources.listing import TABLES, Listing, is_hidden, is_parquet, is_table, list_files
from pipeline.prepare.sources.reading import (
    PIECE_BYTES,
    SITE,
    Piece,
    concat_alike,
    cut_files,
    number_rows,
    pick_column,
    read_column_names,
    read_parquet,
)
from pipeline.prepare.sources.side_files import read_frame, read_once
from pipeline.prepare.sources.source import EVENTS, RawRows, Source
from pipeline.prepare.sources.typed_rows import FileRows, choose_frames
from pipeline.prepare.sources.wide import PREFIX, list_wide_columns, melt
from pipeline.prepare.times import MICROSECONDS
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE, UserError

CHUNK_ROWS: Final = 1 << 20
"""Minimum number of rows of files that are handed out together, but for the last ones of a piece."""

MAX_DESCRIBED_FILES: Final = 100

KINDS: Final = {
    PATIENT_ID: columns.NAMES,
    VARIABLE: columns.NAMES,
    VALUE: columns.NUMBERS,
    SET_INDEX: columns.NUMBERS,
    MINUTE: columns.MINUTES,
    TIME: columns.TIMES,
    ORIGIN: columns.DATES,
    SITE: columns.NAMES,
}


@dataclass(frozen=True, kw_only=True)
class Table(Source, TableLayout):
    """One file, all files of a folder and its folders, or the files of a glob pattern."""

    name: ClassVar[str] = "table"
    wanted: ClassVar[str] = f"files {', '.join(TABLES)} here; name a file, a folder or a pattern"

    @property
    def base(self) -> Path:
        base = self.path
        while glob.has_magic(str(base)) and not base.exists():
            base = base.parent
        return base.parent if base.is_file() else base

    @property
    def options(self) -> dict[str, Any]:
        """Return the options for the manifest; where files lie is not part of them."""
        return super().options | {"origin_table": self.origin_table and self.origin_table[1:]}

    @property
    def dialect(self) -> csv_files.Dialect:
        return csv_files.Dialect(self.separator, self.encoding)

    def list_events(self) -> Listing:
        if self.path.is_file() and not is_table(self.path):
            raise UserError(f"{self.path}: not a table; give {', '.join(TABLES)}")
        others = {path.resolve() for path in self.find_side_files().values() if path}
        if self.path.exists():
            found = list_files(self.path, is_table)
        else:
            paths = sorted(filter(is_table, map(Path, glob.iglob(str(self.path), recursive=True))))
            hidden = [is_hidden(path.relative_to(self.base)) for path in paths]
            found = Listing(
                *([path for path, is_ in zip(paths, hidden, strict=True) if is_ == kind] for kind in (False, True))
            )
        return Listing([path for path in found.files if path.resolve() not in others], found.left_out)

    def find_side_files(self) -> dict[str, Path | None]:
        origins = Path(self.origin_table[0]) if self.origin_table else None
        return super().find_side_files() | {"origins": origins}

    def describe(self) -> list[str]:
        """Say also which columns serve as what, in the first file of each header among the first files."""
        notes = super().describe()
        files = list(self.find_events().values())[:MAX_DESCRIBED_FILES]
        headers = {tuple(self.read_header(path)): path for path in reversed(files)}
        for header, path in reversed(headers.items()):
            roles = self.pick_columns(path, header)
            unused = [name for name in header if name not in roles.values()]
            more = f"; not used: {', '.join(unused)}" if unused else ""
            notes.append(f"{path}: {layout.describe_columns(roles)}{more}")
        return notes

    def read_header(self, path: Path) -> list[str]:
        return read_column_names(path) if is_parquet(path) else csv_files.read_header(path, self.dialect)

    def pieces(self) -> list[Piece]:
        return self.cut()[0]

    def cut(self) -> tuple[list[Piece], dict[str, str]]:
        files = self.find_events()
        texts = {name: path for name, path in files.items() if not is_parquet(path)}
        packed = [name for name, path in texts.items() if csv_files.is_stream(path, self.dialect)]
        large = [name for name, path in texts.items() if name not in packed and path.stat().st_size > PIECE_BYTES]
        alone = [name for name in packed if texts[name].stat().st_size > PIECE_BYTES // csv_files.MAX_PACKING]
        whole = cut_files({name: path for name, path in files.items() if name not in (*large, *alone)})
        with ThreadPoolExecutor(usable_cores()) as threads:
            cut = list(threads.map(lambda name: csv_files.cut_csv(files[name], name), large))
        checksums = {EVENTS + name: checksum for name, (_, checksum) in zip(large, cut, strict=True)}
        pieces = whole + [piece for pieces, _ in cut for piece in pieces]
        return pieces + [Piece(files=(name,)) for name in alone], checksums

    def sample(self, name: str, path: Path, num_bytes: int) -> tuple[Piece, float]:
        if is_parquet(path):
            return super().sample(name, path, num_bytes)
        stop, share = csv_files.find_beginning(path, self.dialect, num_bytes)
        return Piece(files=(name,), stop=stop), share

    def read(self, piece: Piece) -> Iterator[RawRows]:
        first = self.base / piece.files[0]
        roles = self.pick_columns(first, self.read_header(first))
        named = {MINUTE: roles.get(TIME, roles.get(MINUTE, MINUTE)), VALUE: roles.get(VALUE, VALUE)}
        parts: list[FileRows] = []
        for number, name in enumerate(piece.files):
            are_numbers = all(part.read_again for part in parts)  # or those read before would be read again
            for part in self._read_file(self.base / name, piece, number, are_numbers=are_numbers):
                parts.append(part)
                if sum(part.frame.height for part in parts) >= CHUNK_ROWS:
                    yield from self._to_rows(parts, named)
                    parts = []
        if parts:
            yield from self._to_rows(parts, named)

    def _read_file(self, path: Path, piece: Piece, number: int, *, are_numbers: bool) -> Iterator[FileRows]:
        """Yield the rows of a file; numbers in text are read as numbers where ``are_numbers``, and all of them are."""
        header = self.read_header(path)
        roles = self.pick_columns(path, header)
        if is_parquet(path):
            named = {roles[role] for role in (PATIENT_ID, VARIABLE, SITE) if role in roles}
            named -= {column for role, column in roles.items() if role not in (PATIENT_ID, VARIABLE, SITE)}
            frame, first = read_parquet(path, piece, list(dict.fromkeys(roles.values())), name_columns=sorted(named))
            yield FileRows(self._check_columns(path, frame, roles, number, first))
            return
        needed, separator = list(dict.fromkeys(roles.values())), self.dialect.separator_of(path)
        numbers = self._find_numbers(roles) if are_numbers else set()

        def parse(content: bytes, first: int) -> pl.DataFrame:
            frame = parse_rows(path, content, first, header, needed, separator)
            return self._check_columns(path, frame, roles, number, first)

        for content, first in csv_files.read_parts(path, piece, self.dialect):
            typed = parse_numbers(content, header, needed, numbers, separator) if numbers else None
            if typed is None:
                numbers = set()  # what is no number once will be none again
                yield FileRows(parse(content, first))
            else:
                typed = self._check_columns(path, typed, roles, number, first)
                yield FileRows(typed, partial(parse, content, first))

    def _find_numbers(self, roles: Mapping[str, str]) -> set[str]:
        """Return the columns of a long CSV file that are read as numbers, if all of their texts are."""
        if self.decimal_comma or self.categories or self.text_events or not {MINUTE, VALUE} <= roles.keys():
            return set()
        return {roles[MINUTE], roles[VALUE]} - {name for role, name in roles.items() if role not in (MINUTE, VALUE)}

    def pick_columns(self, path: Path, header: Sequence[str]) -> dict[str, str]:
        """Return the file's columns by their roles; those of variables in a wide table have a prefix."""
        return layout.pick_columns(path, header, self, is_static=self._is_static(path))

    def _is_static(self, path: Path) -> bool:
        return any(path.match(pattern) for pattern in self.static_tables)

    def _check_columns(
        self, path: Path, frame: pl.DataFrame, roles: Mapping[str, str], number: int, first: int
    ) -> pl.DataFrame:
        series = {}
        for role, column in roles.items():
            values = frame[column]
            is_number = role in (MINUTE, VALUE) or role.startswith(PREFIX)
            if self.decimal_comma and is_number and values.dtype == pl.String:
                values = values.str.replace(",", ".", literal=True)
            if role == TIME and self.time_unit is not None:
                role = MINUTE
            series[role] = columns.check(path, values, KINDS[role]) if role in KINDS else values
        return number_rows(series, file=number, first=first)

    def _to_rows(self, parts: Sequence[FileRows], named: Mapping[str, str]) -> Iterator[RawRows]:
        frames, read_texts = choose_frames(parts)
        for rows in concat_alike(frames):
            minutes, rules = self._add_minutes(rows)
            if not list_wide_columns(rows):
                yield RawRows(
                    rows=minutes,
                    minute=pl.col(TIME),
                    rules=rules,
                    categories=self.categories,
                    text_events=self.text_events,
                    columns=named,
                    read_texts=read_texts,
                )
                continue
            patients = names.encode(rows[PATIENT_ID], columns.to_patient_names).drop_nulls().unique()
            for events, num_rows in melt(minutes):
                yield RawRows(
                    rows=events,
                    minute=pl.col(TIME),
                    static=TIME not in rows.columns and MINUTE not in rows.columns,
                    rules=rules,
                    categories=self.categories,
                    text_events=True,
                    columns=named,
                    patients=tuple(patients.cast(pl.String)),
                    num_source_rows=num_rows,
                )

    def _add_minutes(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, tuple[tuple[str, pl.Expr], ...]]:
        """Return rows with instants or minutes as ``time`` beside ``minute`` as it came, and rules to reject some."""
        if MINUTE in rows.columns:
            factor = MINUTES_OF_UNIT[self.time_unit or "minutes"]
            return rows.with_columns(columns.to_minutes(rows[MINUTE], factor).alias(TIME)), ()
        if TIME not in rows.columns:  # a static table
            nothing = pl.lit(None)
            return rows.with_columns(
                nothing.cast(pl.String).alias(MINUTE), nothing.cast(pl.Datetime("us")).alias(TIME)
            ), ()
        rows, instants = rows.rename({TIME: MINUTE}), columns.to_times(rows[TIME], are_numbers_minutes=False)
        if instants.dtype.is_float() or (self.origin_table is None and ORIGIN not in rows.columns):
            return rows.with_columns(instants.alias(TIME)), ()
        origins = self._find_origins(rows) if self.origin_table else columns.to_instants(rows[ORIGIN])
        minute = (instants - origins).dt.total_microseconds() / MICROSECONDS
        is_end = (instants >= columns.END_OF_TIME).fill_null(False).alias(END_OF_TIME)
        has_none = (origins.is_null() & instants.is_not_null()).alias(NO_ORIGIN)
        rules = tuple((reason, pl.col(reason)) for reason in (END_OF_TIME, NO_ORIGIN))
        return rows.with_columns(minute.alias(TIME), is_end, has_none), rules

    def _find_origins(self, rows: pl.DataFrame) -> pl.Series:
        """Return the instant from which the minutes of each row's patient count, of ``--origin_table``."""
        patients = names.encode(rows[PATIENT_ID], columns.to_patient_names)
        assert self.origin_table is not None
        known = read_once(_read_origins, Path(self.origin_table[0]), *self.origin_table[1:], self.dialect)
        of_name = {name: known.get(name) for name in patients.dtype.categories.to_list()}  # type: ignore[attr-defined]
        origins = pl.Series(list(of_name.values()), dtype=pl.Datetime("us"))
        return origins.gather(patients.to_physical())


def _read_origins(path: Path, patient_column: str, time_column: str, dialect: csv_files.Dialect) -> dict[str, object]:
    """Return the instant of each patient in ``--origin_table``; the earliest, where there are several."""
    frame, flag = read_frame(path, dialect=dialect), "--origin_table FILE:PATIENT:TIME"
    wanted = (patient_column, time_column)
    patient, time = (frame[pick_column(path, frame.columns, name, (), flag)] for name in wanted)
    instants = columns.to_instants(columns.check(path, time, columns.DATES))
    origins = pl.DataFrame({PATIENT_ID: columns.to_patient_names(patient), TIME: instants}).drop_nulls()
    return dict(origins.group_by(PATIENT_ID).agg(pl.col(TIME).min()).iter_rows())
