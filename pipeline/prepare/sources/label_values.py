"""What the values of a column of labels are: of which kind, which are missing, and their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import polars as pl

from pipeline.prepare.columns import MISSING, NOT_AVAILABLE, to_numbers
from pipeline.schema import FLOAT32_MAX, LABEL, Kind, UserError

NOT_A_NUMBER: Final = ("nan", "+nan", "-nan")

DEATH_COLUMNS: Final = ("In-hospital_death", "Length_of_stay", "Survival")
"""Columns of PhysioNet 2012's outcomes that say who died in hospital, after how many days patients left it, and after
how many they died; -1 = not known, or not at all.
"""

LATER_DEATH: Final = 0.35
LATER_DEATH_DAYS: Final = 120.0
"""The soft label of a death on the day of leaving hospital, and the days in which it falls to 1/e of that."""

UNKNOWN_IS_MINUS_1: Final = ("Length_of_stay", "Survival", "SAPS-I", "SOFA")
"""Columns of PhysioNet 2012's outcomes in which -1 says that the number is not known."""


@dataclass(slots=True)
class LabelFacts:
    """What is known of a column of labels, of which one part after another is looked at."""

    classes: tuple[str, ...] = ()  # that are named, and so are no missing labels
    is_filled: bool = False
    is_binary: bool = True
    has_numbers: bool = False
    has_fractions: bool = False
    are_numbers: bool = True
    words: Counter[str] = field(default_factory=Counter)  # that mean missing

    def update(self, labels: pl.Series) -> None:
        """Look at a part of the column."""
        if labels.null_count() == len(labels):
            return
        unlabelled, numbers = is_unlabelled(labels, self.classes), _to_numbers(labels)
        if labels.dtype == pl.String and unlabelled.any():
            words = _text(labels.filter(unlabelled)).drop_nulls().str.to_lowercase()
            self.words.update(dict(words.filter(words != "").value_counts().iter_rows()))
        given = numbers.filter(~unlabelled)
        self.is_filled |= len(given) > 0
        self.is_binary &= bool(given.is_in([0.0, 1.0, -1.0]).fill_null(False).all())
        self.has_numbers |= given.null_count() < len(given)
        self.has_fractions |= bool((given != given.floor()).any())
        self.are_numbers &= given.null_count() == 0


def find_kind(facts: Sequence[LabelFacts], name: str) -> Kind:
    """Return of what kind labels are that stand in columns called ``name``.

    Labels that are all 0, 1, true or false are binary, words are classes, and what has fractions or is MEDS's
    ``float_value`` is numbers.  Other whole numbers may be either, so a person must say.
    """
    if all(each.is_binary for each in facts):
        return "binary"
    if not any(each.has_numbers for each in facts):
        return "multiclass"
    has_fractions = any(each.has_fractions for each in facts) or name == "float_value"
    return "regression" if has_fractions and all(each.are_numbers for each in facts) else "binary"


def parse_labels(
    path: Path, name: str, labels: pl.Series, kind: Kind, *, first: int = 1, classes: tuple[str, ...] = ()
) -> pl.Series:
    """Return labels of a kind, null = unlabelled: names of classes, or float64, from 0 to 1 where they are binary.

    Args:
        path: names the file in an error, as ``name`` does its column and ``first`` the row of the first label.
        name: the column's name.
        labels: as they came.
        kind: what they are.
        first: number of the first row.
        classes: that are named; a word of them is no missing label.

    Raises:
        UserError: a label is none of the kind.
    """
    number, is_none = _to_numbers(labels), is_unlabelled(labels, classes)
    if kind == "multiclass":
        # A whole number is the same class whether it was stored as 2 or as 2.0.
        whole = (number.floor() == number).fill_null(False)
        names = pl.select(
            pl.when(whole).then(number.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(_text(labels))
        )
        return names.to_series().set(is_none | (number == -1).fill_null(False), None).alias(LABEL)
    if kind == "binary":
        is_right = ((number >= 0) & (number <= 1) | (number == -1)).fill_null(False)
        what = "0, 1, a probability between them, or empty or -1 for none"
        advice = "mend it, or say --label_kind multiclass or regression"
        is_none |= (number == -1).fill_null(False)
    else:
        is_right = (number.abs() <= FLOAT32_MAX).fill_null(False)  # as batches hold them
        what, advice = "a number, or empty for none", "mend it"
        if name in UNKNOWN_IS_MINUS_1:
            is_none |= (number == -1).fill_null(False)
    wrong = (~(is_none | is_right)).arg_true()
    if len(wrong):
        raise UserError(f"{path}: row {wrong[0] + first}, column {name!r}: a label is {what}; {advice}")
    return number.set(is_none, None).cast(pl.Float64, strict=False).alias(LABEL)


def soften_deaths(label: pl.Series, stay: pl.Series, survival: pl.Series) -> pl.Series:
    """Return labels of deaths in hospital of which those of patients who died later are soft.

    A patient who died soon after leaving was more like one who died before than one who lived: the label falls from
    ``LATER_DEATH`` with the days after leaving.

    Args:
        label: as :func:`parse_labels` gives it.
        stay: ``Length_of_stay`` as it came, in days; -1 = not known, and days count from admission.
        survival: ``Survival`` as it came, days from admission to death; -1 = no death is known.
    """
    stay, survival = _to_numbers(stay), _to_numbers(survival)
    died_later = ((label == 0) & stay.is_not_null() & (survival >= 0)).fill_null(False)
    days_after = (survival - stay.clip(0, None)).clip(0, None)
    return label.zip_with(~died_later, LATER_DEATH * (-days_after / LATER_DEATH_DAYS).exp())


def sort_classes(names: set[str]) -> tuple[str, ...]:
    """Return names of classes in order: numbers by size, then words."""
    frame = pl.DataFrame({LABEL: pl.Series(list(names), dtype=pl.String)})
    return tuple(frame.sort(pl.col(LABEL).cast(pl.Float64, strict=False), LABEL, nulls_last=True)[LABEL])


def is_unlabelled(labels: pl.Series, classes: tuple[str, ...] = ()) -> pl.Series:
    """Return where a label is missing: null, not a number, blank, or a word that means missing in other columns too.

    A word of the named ``classes`` is a label.
    """
    named = {name.lower() for name in classes}
    words = [word for word in (*MISSING, *NOT_AVAILABLE) if word not in named]
    text = _text(labels).str.to_lowercase()
    words += [word for word in NOT_A_NUMBER if labels.dtype != pl.String or "nan" not in named]
    return text.is_null() | text.is_in(words).fill_null(False)


def _text(labels: pl.Series) -> pl.Series:
    return labels.cast(pl.String).str.strip_chars()


def _to_numbers(labels: pl.Series) -> pl.Series:
    """Return labels as float64, true and false as 1 and 0; null where one is no number, as a time is none."""
    return to_numbers(labels if labels.dtype.is_numeric() else _text(labels))
