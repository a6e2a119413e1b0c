"""A file of labels: which of its columns serve as what, and its rows as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Self

import polars as pl

from pipeline.prepare import names
from pipeline.prepare.columns import PREDICTION_TIMES, check, is_missing, to_instants, to_minutes, to_patient_names
from pipeline.prepare.sources.label_values import DEATH_COLUMNS, LabelFacts, parse_labels, soften_deaths
from pipeline.prepare.sources.reading import ID_COLUMNS, pick_column
from pipeline.prepare.sources.side_files import read_column_titles, read_frames
from pipeline.schema import TIME_COLUMNS, Kind, Times, UserError

LABEL_COLUMNS: Final = (
    "label", "in_hospital_mortality", "In-hospital_death", "boolean_value", "integer_value", "float_value",
    "categorical_value",
)  # fmt: skip
LABEL_ID_COLUMNS: Final = (*ID_COLUMNS, "hadm_id")

SLICE_ROWS: Final = 1 << 18
"""Maximum number of labels that are worked on at once."""

LabelKind = Literal["auto", "binary", "multiclass", "regression"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelColumns:
    """Which columns serve as what; None = found by their usual names.

    Attributes:
        patient: tried before the usual names.
        time: of dates, or else of minutes.
        kind: of the labels; ``auto`` looks at them.
        classes: names of the classes in their order; none = those that occur.
        minutes_of_unit: of times that are numbers.
    """

    label: str | None = None
    patient: str | None = None
    time: str | None = None
    kind: LabelKind = "auto"
    classes: tuple[str, ...] = ()
    minutes_of_unit: float = 1.0


Slice = tuple[int, pl.Series, pl.Series | None, pl.Series]
"""Number of the first row; patients as names, times and labels of some rows."""


@dataclass(kw_only=True, slots=True)
class LabelFile:
    """A file of labels: which of its columns serve as what, and what they hold.

    ``softens`` says that no column was named, and that deaths after the stay are known, which make labels soft.
    """

    path: Path
    columns: LabelColumns
    patient: str
    label: str
    time: str | None
    times: Times | None
    num_rows: int
    softens: bool
    facts: LabelFacts = field(default_factory=LabelFacts)

    @classmethod
    def survey(cls, path: Path, columns: LabelColumns) -> Self:
        """Read a file once, to see what its columns hold."""
        titles = read_column_titles(path)
        id_columns = [columns.patient, *LABEL_ID_COLUMNS] if columns.patient else LABEL_ID_COLUMNS
        patient = pick_column(path, titles, None, id_columns, "--patient_column, or one of these headers")
        present = [name for name in LABEL_COLUMNS if name in titles]
        known = [pick_column(path, titles, columns.label, present or LABEL_COLUMNS, "--label_column")]
        if columns.label is None:
            known += [name for name in present if name not in known]
        named = [columns.time] if columns.time else [name for name in TIME_COLUMNS.values() if name in titles][:1]
        time = pick_column(path, titles, named[0], (), "--time_column") if named else None
        facts = {name: LabelFacts(columns.classes) for name in known}
        num_rows, has_dates, has_minutes = 0, False, False
        for frame in read_frames(path, list(dict.fromkeys([*known, *([time] if time else [])]))):
            for part in frame.iter_slices(SLICE_ROWS):
                num_rows += part.height
                for name in known:
                    facts[name].update(part[name])
                if time and not has_dates:
                    has_dates, is_minutes = _look_at_times(check(path, part[time], PREDICTION_TIMES))
                    has_minutes |= is_minutes
        label = next((name for name in known if facts[name].is_filled), known[0])
        pick_column(path, titles, label, (), "--label_column")
        times: Times | None = ("minute" if has_minutes and not has_dates else "date") if time else None
        softens = columns.label is None and label == DEATH_COLUMNS[0] and set(DEATH_COLUMNS) <= set(titles)
        return cls(path=path, columns=columns, patient=patient, label=label, time=time, times=times,
                   num_rows=num_rows, softens=softens, facts=facts[label])  # fmt: skip

    def find_classes(self) -> set[str]:
        """Return the names of the classes that occur."""
        found: set[str] = set()
        for frame in read_frames(self.path, [self.label]):
            for part in frame.iter_slices(SLICE_ROWS):
                found.update(self._parse(part[self.label], "multiclass", 1).drop_nulls().unique())
        return found

    def read_patients(self) -> Iterator[pl.Series]:
        """Yield the names of the patients of the rows, some rows at a time, each name once."""
        for frame in read_frames(self.path, [self.patient]):
            for part in frame.iter_slices(SLICE_ROWS):
                yield to_patient_names(part[self.patient].unique()).drop_nulls().unique()

    def read_slices(self, kind: Kind) -> Iterator[Slice]:
        """Yield the rows, some at a time; one that lacks patient or time, or whose label is none, is a UserError."""
        first, wanted = 1, [self.patient, self.label, *([self.time] if self.time else [])]
        softens = self.softens and kind == "binary"
        for frame in read_frames(self.path, list(dict.fromkeys([*wanted, *(DEATH_COLUMNS if softens else ())]))):
            for part in frame.iter_slices(SLICE_ROWS):
                patient = names.encode(part[self.patient], to_patient_names)
                time = self._parse_times(part[self.time], first) if self.time else None
                for column, name in ((patient, self.patient), (time, self.time)) if time is not None else ():
                    if column.null_count():
                        row = column.is_null().arg_true()[0] + first
                        raise UserError(f"{self.path}: row {row} has no {name}; give one, or leave the row out")
                label = self._parse(part[self.label], kind, first)
                if softens:
                    label = soften_deaths(label, *(part[name] for name in DEATH_COLUMNS[1:]))
                yield first, patient, time, label
                first += part.height

    def _parse(self, labels: pl.Series, kind: Kind, first: int) -> pl.Series:
        return parse_labels(self.path, self.label, labels, kind, first=first, classes=self.columns.classes)

    def _parse_times(self, column: pl.Series, first: int) -> pl.Series:
        """Return prediction times as dates, or as minutes; raise UserError where one is neither."""
        factor = self.columns.minutes_of_unit
        times = to_instants(column) if self.times == "date" else to_minutes(column) * factor
        wrong = (times.is_null() & ~is_missing(column)).arg_true()
        if len(wrong):
            row = f"row {wrong[0] + first}, column {column.name!r}"
            raise UserError(f"{self.path}: {row}: neither an ISO date nor a number of minutes; mend it")
        return times


def _look_at_times(column: pl.Series) -> tuple[bool, bool]:
    """Return whether there are dates, and whether there are minutes, in a part of a column of times."""
    if column.dtype == pl.Duration or column.dtype.is_numeric():
        return False, True
    if column.dtype != pl.String:
        return True, False
    has_dates = to_instants(column).null_count() < len(column)
    return has_dates, not has_dates and to_minutes(column).null_count() < len(column)
