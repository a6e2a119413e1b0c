"""Which columns of a table serve as what: by flags, else by the names that data sets of this field use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import polars as pl

from pipeline.options import Section, option
from pipeline.prepare.sources.csv_files import parse_encoding, parse_separator
from pipeline.prepare.sources.label_files import LABEL_COLUMNS
from pipeline.prepare.sources.reading import ID_COLUMNS, SITE, pick_column
from pipeline.prepare.sources.side_files import read_keyed_frame
from pipeline.prepare.sources.wide import PREFIX
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE, UserError

VARIABLE_COLUMNS: Final = ("variable", "code", "itemid", "measurement_concept_id", "parameter")
VALUE_COLUMNS: Final = ("valuenum", "value_as_number", "numeric_value", "value")
MINUTE_COLUMNS: Final = ("minute", "minutes")
TIME_COLUMNS: Final = ("time", "charttime", "measurement_datetime", "timestamp")

NO_VARIABLES: Final = (*ID_COLUMNS, *LABEL_COLUMNS, "hadm_id", "SepsisLabel", "hospital_expire_flag", "is_carry")
"""Columns of wide tables that are no variables: other ids, and outcomes."""
NO_VARIABLE_NAMES: Final = r"(?i)(time|date)$|^Unnamed|^$"
"""Further times, and the index that pandas writes."""

TIME: Final = "time"
ORIGIN: Final = "origin"

TimeUnit: TypeAlias = Literal["seconds", "minutes", "hours", "days"]
MINUTES_OF_UNIT: Final[Mapping[str, float]] = {"seconds": 1 / 60, "minutes": 1.0, "hours": 60.0, "days": 1440.0}


def parse_origin_table(text: str) -> tuple[str, str, str]:
    """Return the parts of ``FILE:PATIENT:TIME``; raise ValueError where there are not three."""
    path, _, rest = text.rpartition(":")
    path, _, patient = path.rpartition(":")
    if not (path and patient and rest):
        raise ValueError(f"{text!r} is not FILE:PATIENT_COLUMN:TIME_COLUMN")
    return str(Path(path).absolute()), patient, rest


def read_categories(text: str) -> dict[str, float]:
    """Return the number of each ``variable=category`` of a CSV file of ``variable``, ``category``, ``value``."""
    path = Path(text)
    frame = read_keyed_frame(
        path, (VARIABLE, "category", VALUE), "variable,category,value", keys=(VARIABLE, "category")
    )
    numbers = frame[VALUE].cast(pl.Float64, strict=False)
    wrong = (~numbers.is_finite().fill_null(False)).arg_true()
    if len(wrong):
        raise UserError(f"{path}: row {wrong[0] + 1} has no number as value; mend it")
    pairs = zip(frame[VARIABLE], frame["category"], strict=True)
    return {f"{variable}={category}": number for (variable, category), number in zip(pairs, numbers, strict=True)}


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(Section):
    """Columns that several formats have."""

    value_column: str | None = option(None, "Column of the value, of table and meds.")
    site_column: str | None = option(
        None, "Column of the site, such as a hospital, of table and meds: medians of its values are compared."
    )


@dataclass(frozen=True, kw_only=True)
class TableOptions(Section):
    """Options of --format table; without them columns are found by their usual names."""

    patient_column: str | None = option(None, "Column of the patient.")
    minute_column: str | None = option(None, "Column of minutes since the patient's time origin.")
    time_column: str | None = option(None, "Column of dates with time or of durations, used instead of minutes.")
    time_unit: TimeUnit | None = option(None, "Unit of a time column that holds numbers.")
    origin_column: str | None = option(None, "Column of dates from which minutes count, instead of the first event.")
    origin_table: tuple[str, ...] | None = option(
        None,
        "Table of the dates from which minutes count, and its columns of patient and date.",
        metavar="FILE:PATIENT:TIME",
        parse=parse_origin_table,
    )
    variable_column: str | None = option(None, "Column of the variable.")
    set_column: str | None = option(None, "Column of the set's number in the patient; else a set is a minute.")
    wide: bool | None = option(None, "Read tables with a column a variable; by default the columns decide.")
    static_tables: tuple[str, ...] = option((), "Wide tables without a time column, by name or pattern of names.")
    ignore_columns: tuple[str, ...] = option((), "Columns of wide tables that are no variables, such as outcomes.")
    categories: Mapping[str, float] = option(
        dict, "CSV file of variable, category, value: numbers in place of texts.", parse=read_categories
    )
    text_events: bool = option(False, "Make events without a number, VARIABLE=TEXT, of texts in a long table's values.")
    separator: str | None = option(
        None, "Separator of fields in CSV files, where their name does not say it.", parse=parse_separator
    )
    decimal_comma: bool = option(False, "Numbers of CSV files have a decimal comma.")
    encoding: str = option("utf-8", "Encoding of CSV files, such as latin-1.", parse=parse_encoding)


@dataclass(frozen=True, kw_only=True)
class TableLayout(TableOptions, ColumnOptions):
    """All options that say which columns of a table serve as what."""


def pick_columns(path: Path, header: Sequence[str], options: TableLayout, *, is_static: bool) -> dict[str, str]:
    """Return the columns of a file by their roles; those of variables in a wide table have a prefix."""

    def pick(flag: str, known: tuple[str, ...]) -> str:
        return pick_column(path, header, getattr(options, flag), known, f"--{flag}")

    columns = {PATIENT_ID: pick("patient_column", ID_COLUMNS)}
    if options.site_column and (options.site_column in header or not is_static):
        columns[SITE] = pick("site_column", ())
    if not is_static:
        columns |= _pick_time(path, header, options)
        if options.set_column or SET_INDEX in header:
            columns[SET_INDEX] = pick("set_column", (SET_INDEX,))
    if is_static or _is_wide(header, options):
        return columns | _pick_variables(path, header, columns, options)
    columns[VARIABLE] = pick("variable_column", VARIABLE_COLUMNS)
    columns[VALUE] = pick("value_column", VALUE_COLUMNS)
    return columns


def _pick_time(path: Path, header: Sequence[str], options: TableLayout) -> dict[str, str]:
    lower = [name.lower() for name in header]
    if options.minute_column or (not (options.time_column or options.time_unit) and set(MINUTE_COLUMNS) & set(lower)):
        return {MINUTE: pick_column(path, header, options.minute_column, MINUTE_COLUMNS, "--minute_column")}
    known = (*MINUTE_COLUMNS, *TIME_COLUMNS)
    flags = "--minute_column or --time_column, or with --static_tables a table without a time"
    columns = {TIME: pick_column(path, header, options.time_column, known, flags)}
    if options.origin_column:
        columns[ORIGIN] = pick_column(path, header, options.origin_column, (), "--origin_column")
    return columns


def _is_wide(header: Sequence[str], options: TableLayout) -> bool:
    if options.wide is not None:
        return options.wide
    lower = {name.lower() for name in header}
    named = options.variable_column or options.value_column
    return not named and not lower & {*map(str.lower, VARIABLE_COLUMNS), *VALUE_COLUMNS}


def _pick_variables(
    path: Path, header: Sequence[str], columns: Mapping[str, str], options: TableLayout
) -> dict[str, str]:
    ignored = {name.lower() for name in (*NO_VARIABLES, *options.ignore_columns)}
    others = [name for name in header if name not in columns.values() and name.lower() not in ignored]
    wide = [name for name in others if not re.search(NO_VARIABLE_NAMES, name)]
    if not wide:
        raise UserError(f"{path}: no column of a variable; name one of {', '.join(header)} with --variable_column")
    repeated = [name for name in wide if wide.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: column {repeated[0]!r} is there more than once; keep one")
    return {PREFIX + name: name for name in wide}


def describe_columns(columns: Mapping[str, str]) -> str:
    """Return in words which columns of a file serve as what."""
    wide = [name for role, name in columns.items() if role.startswith(PREFIX)]
    roles: list[Any] = [f"{role} = {name}" for role, name in columns.items() if not role.startswith(PREFIX)]
    if wide:
        roles.append(f"{len(wide)} variables: {', '.join(wide[:8])}{' …' if len(wide) > 8 else ''}")
    return ", ".join(roles)
