"""Warnings about a prepared data set that a person should see before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import polars as pl

from pipeline.dataset.tasks import SampleCounts
from pipeline.prepare.moments import Moments

FLATTENING_SHARE: Final = 0.5
"""Share of a variable's variance, above which a single value flattens all others."""

MIN_VALUES: Final = 100
"""Minimum number of values of a variable for that to be said."""

MAX_NAMED: Final = 5
"""Maximum number of variables that a warning names."""


def find_warnings(train: Moments, splits: Mapping[str, SampleCounts]) -> list[str]:
    """Return warnings about the variables of the train split, and about splits whose labels are all alike.

    Args:
        train: moments of the train split's variables.
        splits: counts of each split of a task; none without labels.
    """
    return [*_warn_of_outliers(train), *_warn_of_constants(train), *warn_of_splits(splits)]


def _warn_of_outliers(train: Moments) -> list[str]:
    """Name the variables of which a single value makes up most of the variance."""
    reach = np.maximum(train.maximum - train.mean, train.mean - train.minimum)
    share = np.where(train.squares > 0, reach**2 / np.where(train.squares > 0, train.squares, 1.0), 0.0)
    flattened = np.flatnonzero((share > FLATTENING_SHARE) & (train.num_values >= MIN_VALUES))
    advice = "set limits with --ranges or --outlier_std"
    return [
        f"variable {train.variables[number]!r}: a single value makes up {share[number]:.0%} of the variance, so that "
        f"all others look alike to a model; {advice}"
        for number in flattened
    ]


def _warn_of_constants(train: Moments) -> list[str]:
    constant = np.flatnonzero((train.num_values > 1) & (train.squares == 0))
    return [f"always the same value: {name_some([train.variables[at] for at in constant])}"] if len(constant) else []


def warn_of_splits(splits: Mapping[str, SampleCounts]) -> list[str]:
    """Return warnings about splits of a task that lack labels, or a class of them."""
    if not any(counts.num_labelled for counts in splits.values()):
        return []
    warnings, advice = [], "look at --split_fractions"
    for split, counts in splits.items():
        missing = [number for number, samples in enumerate(counts.class_counts) if not samples]
        if counts.num_samples and not counts.num_labelled:
            warnings.append(f"split {split} has no label: no quality can be computed there; {advice}")
        elif len(counts.class_counts) == 2 and missing:
            kind = "no negative label" if missing == [0] else "no positive label"
            warnings.append(f"split {split} has {kind}: no AUROC can be computed there; {advice}")
        elif missing:
            which = f"{len(missing)} of {len(counts.class_counts)} classes"
            what = "never learned" if split == "train" else "not measured there"
            warnings.append(f"split {split} has no sample of {which}, which are {what}; {advice}")
    return warnings


def warn_of_strangers(label_ids: pl.Series, patient_ids: pl.Series) -> list[str]:
    """Return a warning where labels name patients that the input does not have, and say where ids nearly agree.

    Ids nearly agree that differ in zeros before them or in the case of letters alone.
    """
    strangers = label_ids.filter(~label_ids.is_in(patient_ids.implode()))
    if not len(strangers):
        return []
    unlabelled = patient_ids.filter(~patient_ids.is_in(label_ids.implode()))
    near = _strip_id(strangers).is_in(_strip_id(unlabelled).implode()).sum()
    hint = f"; {near:,} of them differ from an id of the input in leading zeros or case alone" if near else ""
    return [f"{len(strangers):,} labels name no patient of the input{hint}"]


def _strip_id(ids: pl.Series) -> pl.Series:
    return ids.str.to_lowercase().str.strip_chars_start("0")


def name_some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(map(repr, names[:MAX_NAMED])) + more
