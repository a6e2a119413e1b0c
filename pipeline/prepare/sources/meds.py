"""MEDS 0.3 and 0.4, the Medical Event Data Standard: ``data/**/*.parquet``, ``metadata/`` and labels of a task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.options import Section, option
from pipeline.prepare import names
from pipeline.prepare.columns import (
    DATES,
    NAMES,
    NUMBERS,
    check,
    to_instants,
    to_patient_names,
)
from pipeline.prepare.sources.label_files import LabelColumns
from pipeline.prepare.sources.labels import read_label_patients
from pipeline.prepare.sources.layout import ColumnOptions
from pipeline.prepare.sources.listing import Listing, is_parquet, list_files, list_tables
from pipeline.prepare.sources.meds_codes import (
    DECLARED,
    MODIFIERS,
    SITES,
    count_texts,
    join_modifiers,
    join_sites,
    read_declared,
    read_descriptions,
    read_roll_up,
    roll_up,
)
from pipeline.prepare.sources.reading import (
    SITE,
    SPLIT,
    Piece,
    concat_alike,
    cut_files,
    number_rows,
    pick_column,
    read_column_names,
    read_parquet,
    reading,
)
from pipeline.prepare.sources.side_files import read_once
from pipeline.prepare.sources.source import GivenSplits, Origin, RawRows, Source, read_split_slices
from pipeline.prepare.splits import SplitName
from pipeline.schema import MINUTE, PATIENT_ID, SPLITS, VALUE, VARIABLE, UserError

SUBJECT_ID: Final = "subject_id"
SUBJECT_IDS: Final = (SUBJECT_ID, "patient_id")
"""Column of the subject in MEDS 0.4, and in 0.3."""

COLUMNS: Final = ("time", "code")
SUBJECT: Final = "subject"  # int64, a subject of the rows as they came
NUMERIC_VALUE: Final = "numeric_value"
TEXT_VALUE: Final = "text_value"
EXCLUDED: Final = "excluded"  # bool, whether the code is one of --exclude_codes
DATASET: Final = "dataset.json"

BIRTH: Final = r"^MEDS_BIRTH(//|$)"

SplitMap: TypeAlias = tuple[tuple[str, SplitName], ...]
SPLIT_MAP: Final[SplitMap] = (("train", "train"), ("tuning", "valid"), ("held_out", "test"))


def parse_split_map(text: str) -> Any:
    """Return the pairs of ``NAME=SPLIT,…``; raise ValueError where it is none."""
    pairs = tuple((name, split) for name, _, split in (part.rpartition("=") for part in text.split(",")))
    if len({name for name, _ in pairs}) < len(pairs) or not {split for _, split in pairs} <= set(SPLITS):
        raise ValueError(f"{text!r} is not NAME=SPLIT,…, each name once, a split one of {', '.join(SPLITS)}")
    return pairs


@dataclass(frozen=True, kw_only=True)
class MedsOptions(Section):
    """Options of --format meds."""

    labelled_only: bool = option(False, "Leave out subjects without a sample in --labels.")
    origin_code: str | None = option(None, "Code from which minutes count, instead of the first event but birth.")
    exclude_codes: tuple[str, ...] = option((), "Regular expressions of codes to reject, or none.")
    code_modifiers: tuple[str, ...] = option(
        (), "Columns whose texts are joined to the code, CODE//TEXT, or declared: those that dataset.json declares."
    )
    roll_up: tuple[str, ...] = option(
        (),
        "Vocabularies, such as LOINC: codes become their nearest parent of one, by the parent_codes of codes.parquet.",
    )
    split_map: SplitMap = option(SPLIT_MAP, "Splits of the names in subject_splits.parquet.", parse=parse_split_map)


@dataclass(frozen=True, kw_only=True)
class Meds(Source, MedsOptions, ColumnOptions):
    """The folder that holds ``data`` and ``metadata``.

    A patient is a subject, named by its id, with all its events: where samples end, tasks say.
    """

    name: ClassVar[str] = "meds"
    wanted: ClassVar[str] = "data/**/*.parquet here; name the folder that holds data and metadata"
    patient_column: ClassVar[str] = SUBJECT_ID  # of labels, where they name stays too
    event_options: ClassVar[tuple[str, ...]] = ("origin_code", "exclude_codes", "code_modifiers", "roll_up")

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"split_map": dict(self.split_map), "exclude_codes": self._expressions}

    @property
    def _expressions(self) -> tuple[str, ...]:
        return tuple(expression for expression in self.exclude_codes if expression != "none")

    @property
    def origin(self) -> Origin:
        return Origin(variable=self.origin_code, never=BIRTH)

    @property
    def _data(self) -> Path:
        """The folder of events; where splits are named by folders, that may be the data set itself."""
        return self.path / "data" if (self.path / "data").is_dir() else self.path

    def list_events(self) -> Listing:
        found = list_files(self._data, is_parquet)
        is_event = [path.relative_to(self.path).parts[0] != "metadata" for path in found.files]
        return Listing(list(compress(found.files, is_event)), found.left_out)

    def find_side_files(self) -> dict[str, Path | None]:
        metadata = self.path / "metadata"
        paths = {name: metadata / f"{name}.parquet" for name in ("subject_splits", "codes")}
        paths |= {"dataset": metadata / DATASET} if DECLARED in self.code_modifiers or self._sites else {}
        if (metadata / "subject_splits").is_dir():
            paths["subject_splits"] = metadata / "subject_splits"
        return super().find_side_files() | {name: path for name, path in paths.items() if path.exists()}

    def pieces(self) -> list[Piece]:
        self._is_excluded(pl.Series([""]))  # what is wrong is found before the work
        self._find_parents()
        return cut_files(self.find_events())

    def read(self, piece: Piece) -> Iterator[RawRows]:
        for rows in concat_alike([self._read_file(piece, number) for number in range(len(piece.files))]):
            yield self._to_rows(rows)

    def describe(self) -> list[str]:
        """Say also where events have no number, and which column looks like it."""
        notes, files = super().describe(), self.list_events().files
        with reading(files[0]):
            schema = pq.read_schema(files[0])
        if self.value_column is None and NUMERIC_VALUE not in schema.names:
            known = (*SUBJECT_IDS, *COLUMNS)
            others = [field.name for field in schema if field.name not in known and _is_number(field.type)]
            hint = f"; if {others[0]!r} holds them, say --value_column {others[0]}" if others else ""
            notes.append(f"{files[0]}: no column {NUMERIC_VALUE!r}: no event has a number{hint}")
        if num_texts := count_texts(files, TEXT_VALUE):
            notes.append(f"{self._data}: {num_texts:,} events have a {TEXT_VALUE}, which is not read")
        modifiers = self._read_declared(MODIFIERS)
        if modifiers and not self.code_modifiers:
            declares = f"declares {', '.join(modifiers)}, which {'is' if len(modifiers) == 1 else 'are'} left alone"
            notes.append(
                f"{self.path / 'metadata' / DATASET}: {declares}; --code_modifiers {DECLARED} joins them to the code"
            )
        if self._sites:
            notes.append(f"sites are those of {', '.join(self._sites)}: medians are compared between them")
        if parents := self._find_parents():
            into = len(set(parents.values()))
            notes.append(f"--roll_up: {len(parents):,} codes become {into:,}, if they occur; others stay as they are")
        return notes

    @cached_property
    def _modifiers(self) -> tuple[str, ...]:
        declared = self._read_declared(MODIFIERS) if DECLARED in self.code_modifiers else ()
        return (*declared, *(name for name in self.code_modifiers if name != DECLARED))

    @cached_property
    def _sites(self) -> tuple[str, ...]:
        """Columns by whose values medians are compared."""
        return (self.site_column,) if self.site_column else self._read_declared(SITES)

    def _read_declared(self, key: str) -> tuple[str, ...]:
        return read_declared(self.path / "metadata" / DATASET, key)

    def _find_parents(self) -> dict[str, str]:
        """Return the code that stands for each one that is rolled up."""
        codes = self.path / "metadata" / "codes.parquet"
        return read_once(read_roll_up, codes, self.roll_up) if self.roll_up else {}

    def _to_rows(self, rows: pl.DataFrame) -> RawRows:
        rows = rows.with_columns(pl.col(SUBJECT).alias(PATIENT_ID))
        rules = [("excluded_code", pl.col(EXCLUDED))]
        labels = self.find_side_files()["labels"]
        if self.labelled_only and labels:
            labelled = read_once(_read_labelled, labels, self.label_columns)
            rules.insert(0, ("no_sample", ~pl.col(SUBJECT).is_in(labelled.implode())))
        return RawRows(rows=rows, minute=pl.col(MINUTE), static=True, rules=tuple(rules))

    def _read_file(self, piece: Piece, number: int) -> pl.DataFrame:
        """Return ``file``, ``row``, ``subject`` int64, ``minute`` (instants), ``variable``, ``value``, ``excluded``.

        Where the data set has columns of sites, ``site`` too.
        """
        path = self.path / piece.files[number]
        present = read_column_names(path)
        subject = pick_column(path, present, None, SUBJECT_IDS, "one of these headers")
        named = [*self._modifiers, *filter(None, [self.value_column, self.site_column])]
        needed = dict.fromkeys([subject, *COLUMNS, *named])
        sites = [name for name in self._sites if name in present]
        optional = [name for name in dict.fromkeys([NUMERIC_VALUE, *sites]) if name not in needed]
        frame, first = read_parquet(path, piece, list(needed), optional, name_columns=["code", *sites])
        no_value = pl.repeat(None, frame.height, dtype=pl.Float32, eager=True)
        code, value = frame["code"], frame.get_column(self.value_column or NUMERIC_VALUE, default=no_value)
        code = code if isinstance(code.dtype, pl.Enum) else names.encode(check(path, code, NAMES))
        excluded = names.test(code, self._is_excluded).fill_null(False)
        if self.roll_up:
            code = roll_up(code, self._find_parents())
        if self._modifiers:
            code = join_modifiers(code, [check(path, frame[name], NAMES) for name in self._modifiers])
        columns = {
            SUBJECT: _to_subjects(path, frame[subject]),
            MINUTE: to_instants(check(path, frame["time"], DATES)),
            VARIABLE: code,
            VALUE: check(path, value, NUMBERS),
            EXCLUDED: excluded,
        }
        if self._sites:
            columns[SITE] = join_sites([check(path, frame[name], NAMES) for name in sites], frame.height)
        return number_rows(columns, file=number, first=first)

    def _is_excluded(self, codes: pl.Series) -> pl.Series:
        return names.find_expressions(codes, self._expressions)

    def read_splits(self) -> GivenSplits | None:
        path = self.find_side_files().get("subject_splits")
        return None if path is None else GivenSplits(path, lambda: self._read_splits(path))

    def _read_splits(self, path: Path) -> Iterator[pl.DataFrame]:
        known, num_before = dict(self.split_map), 0
        for part in list_tables(path):
            for first, subjects, splits in read_split_slices(part, SUBJECT_IDS, "subject_id,split"):
                patients = _to_subjects(part, subjects, first).cast(pl.String)
                unknown = (~splits.is_in(list(known)).fill_null(False)).arg_true()
                if len(unknown):
                    where, name = f"{path}: row {num_before + unknown[0] + 1}", splits[unknown[0]]
                    advice = "say which is which: --split_map NAME=train,OTHER=test"
                    raise UserError(f"{where} has split {name!r}, not one of {', '.join(known)}; {advice}")
                yield pl.DataFrame({PATIENT_ID: patients, SPLIT: splits.replace_strict(known)})
                num_before += len(splits)

    def read_descriptions(self) -> dict[str, str]:
        path = self.find_side_files().get("codes")
        return {} if path is None else read_descriptions(path)


def _read_labelled(path: Path, columns: LabelColumns) -> pl.Series:
    """Return the subjects that have a sample."""
    parts = [part.cast(pl.Int64, strict=False) for part in read_label_patients(path, columns)]
    return pl.concat([pl.Series(SUBJECT, dtype=pl.Int64), *parts]).drop_nulls().unique()


def _to_subjects(path: Path, column: pl.Series, first: int = 1) -> pl.Series:
    """Return subjects as int64; raise UserError where one is no whole number that int64 holds.

    ``first`` is the number of the first row.
    """
    if column.dtype.is_integer() and column.dtype != pl.UInt64:
        return column.cast(pl.Int64).rename(SUBJECT)
    text = to_patient_names(check(path, column, NAMES))
    subjects = text.cast(pl.Int64, strict=False)
    wrong = (subjects.is_null() & text.is_not_null()).arg_true()
    if len(wrong):
        raise UserError(
            f"{path}: row {wrong[0] + first} has a {column.name} that is no int64, as MEDS has it; mend the file"
        )
    return subjects.rename(SUBJECT)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind))
