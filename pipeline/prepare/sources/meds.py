"""MEDS 0.4, the Medical Event Data Standard: ``data/**/*.parquet``, ``metadata/``, and label files of a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import polars as pl
import pyarrow.parquet as pq

from pipeline.options import Section, option
from pipeline.prepare import names
from pipeline.prepare.sources.reading import (
    SPLIT,
    UNREADABLE,
    Piece,
    cut_files,
    number_rows,
    read_parquet,
    to_plain_column,
    to_utc,
)
from pipeline.prepare.sources.side_files import read_frame
from pipeline.prepare.sources.source import Origin, RawRows, Source, check_splits
from pipeline.prepare.splits import SplitName
from pipeline.schema import MINUTE, PATIENT_ID, SPLITS, VALUE, VARIABLE, UserError

SUBJECT_ID: Final = "subject_id"
COLUMNS: Final = (SUBJECT_ID, "time", "code")
SUBJECT: Final = "subject"  # int64, a subject of the rows as they came
NUMERIC_VALUE: Final = "numeric_value"

BIRTH: Final = r"^MEDS_BIRTH(//|$)"

SplitMap: TypeAlias = tuple[tuple[str, SplitName], ...]
SPLIT_MAP: Final[SplitMap] = (("train", "train"), ("tuning", "valid"), ("held_out", "test"))


def is_meds(path: Path) -> bool:
    """Return whether the folder holds a file below ``data`` with MEDS's columns."""
    first = min((path / "data").rglob("*.parquet"), default=None)
    try:
        return first is not None and set(COLUMNS) <= set(pq.read_schema(first).names)
    except UNREADABLE:
        return False


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
    split_map: SplitMap = option(SPLIT_MAP, "Splits of the names in subject_splits.parquet.", parse=parse_split_map)


@dataclass(frozen=True, kw_only=True)
class Meds(Source, MedsOptions):
    """The folder that holds ``data`` and ``metadata``.

    A patient is a subject, named by its id, with all its events: where samples end, tasks say.
    """

    name: ClassVar[str] = "meds"
    event_options: ClassVar[tuple[str, ...]] = ("origin_code", "exclude_codes")

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"split_map": dict(self.split_map), "exclude_codes": self._expressions}

    @property
    def _expressions(self) -> tuple[str, ...]:
        return tuple(expression for expression in self.exclude_codes if expression != "none")

    @property
    def origin(self) -> Origin:
        return Origin(variable=self.origin_code, never=BIRTH)

    def find_events(self) -> dict[str, Path]:
        wanted = "data/**/*.parquet here; name the folder that holds data and metadata"
        return self.name_files(sorted((self.path / "data").rglob("*.parquet")), wanted)

    def find_side_files(self) -> dict[str, Path | None]:
        paths = {name: self.path / "metadata" / f"{name}.parquet" for name in ("subject_splits", "codes")}
        return super().find_side_files() | {name: path for name, path in paths.items() if path.is_file()}

    def pieces(self) -> list[Piece]:
        self._is_excluded(pl.Series([""]))  # a wrong expression is found before the work
        return cut_files(self.find_events())

    def read(self, piece: Piece) -> RawRows:
        frames = [self._read_file(piece, number) for number in range(len(piece.files))]
        codes = names.concat([frame[VARIABLE] for frame in frames])
        excluded = names.test(codes, self._is_excluded).fill_null(False)
        rows = pl.concat([frame.drop(VARIABLE) for frame in frames], how="vertical_relaxed")
        rows = rows.with_columns(codes, excluded.alias("excluded"))
        rules = [("excluded_code", pl.col("excluded"))]
        rows = rows.with_columns(pl.col(SUBJECT).alias(PATIENT_ID))
        if self.labelled_only and (labels := self.read_labels()):
            is_labelled = pl.col(SUBJECT).cast(pl.String).is_in(labels.frame[PATIENT_ID].unique().to_list())
            rules.insert(0, ("no_sample", ~is_labelled))
        return RawRows(rows=rows, minute=pl.col(MINUTE), static=True, rules=tuple(rules))

    def _read_file(self, piece: Piece, number: int) -> pl.DataFrame:
        """Return ``file``, ``row``, ``subject`` int64, ``minute`` (instants), ``variable``, ``value``."""
        path = self.path / piece.files[number]
        frame, first = read_parquet(path, piece, COLUMNS, [NUMERIC_VALUE], name_columns=["code"])
        no_value = pl.repeat(None, frame.height, dtype=pl.Float32, eager=True)
        code, value = frame["code"], frame.get_column(NUMERIC_VALUE, default=no_value)
        is_encoded = isinstance(code.dtype, pl.Enum)
        columns = {
            SUBJECT: _to_subjects(path, frame),
            MINUTE: _to_instants(path, frame["time"]),
            VARIABLE: code if is_encoded else names.encode(to_plain_column(path, "code", code)),
            VALUE: _check_type(path, value, value.dtype.is_numeric() or value.dtype == pl.Null),
        }
        return number_rows(columns, file=number, first=first)

    def _is_excluded(self, codes: pl.Series) -> pl.Series:
        """Return [N] bool, whether an expression of ``exclude_codes`` is found in a code."""
        excluded = pl.repeat(False, len(codes), eager=True)
        for expression in self._expressions:
            try:
                excluded |= codes.str.contains(expression).fill_null(False)
            except pl.exceptions.ComputeError as error:
                raise UserError(f"--exclude_codes {expression}: no regular expression ({error}); mend it") from None
        return excluded

    def read_splits(self) -> pl.DataFrame | None:
        path = self.find_side_files().get("subject_splits")
        if path is None:
            return None
        frame = read_frame(path, (SUBJECT_ID, SPLIT))
        known = dict(self.split_map)
        unknown = (~frame[SPLIT].is_in(list(known)).fill_null(False)).arg_true()
        if len(unknown):
            where, name = f"{path}: row {unknown[0] + 1}", frame[SPLIT][unknown[0]]
            advice = "say which is which: --split_map NAME=train,OTHER=test"
            raise UserError(f"{where} has split {name!r}, not one of {', '.join(known)}; {advice}")
        return check_splits(path, _to_subjects(path, frame).cast(pl.String), frame[SPLIT].replace_strict(known))

    def read_descriptions(self) -> dict[str, str]:
        """Return each code's descriptions, each once, in the order of ``codes.parquet``."""
        path = self.find_side_files().get("codes")
        if path is None:
            return {}
        frame = read_frame(path, ["code"])
        if "description" not in frame.columns:
            return {}
        text = frame.select(pl.col("code", "description").cast(pl.String).str.strip_chars()).drop_nulls()
        text = text.filter(pl.col("description") != "").unique(maintain_order=True)
        return dict(text.group_by("code").agg(pl.col("description").str.join("; ")).iter_rows())


def _to_subjects(path: Path, frame: pl.DataFrame) -> pl.Series:
    column = frame[SUBJECT_ID]
    return _check_type(path, column, column.dtype.is_integer()).cast(pl.Int64).rename(SUBJECT)


def _to_instants(path: Path, column: pl.Series) -> pl.Series:
    return to_utc(_check_type(path, column, isinstance(column.dtype, pl.Datetime | pl.Date | pl.Null)))


def _check_type(path: Path, column: pl.Series, fits: bool) -> pl.Series:
    if not fits:
        raise UserError(f"{path}: column {column.name!r} holds {column.dtype}, which MEDS does not; mend the file")
    return column
