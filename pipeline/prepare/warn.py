"""Warnings about a prepared data set that a person should see before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import polars as pl

from pipeline.dataset.tasks import SampleCounts, Task
from pipeline.prepare.join_samples import count_similar_strangers
from pipeline.prepare.moments import Moments
from pipeline.prepare.scales import Scale, compare_scales
from pipeline.prepare.sources.labels import Labels

FLATTENING_SHARE: Final = 0.5
"""Share of a variable's variance, above which a single value flattens all others."""

MIN_VALUES: Final = 100
"""Minimum number of values of a variable for that to be said."""

MAX_NAMED: Final = 5
"""Maximum number of variables that a warning names."""


def find_warnings(train: Moments, splits: Mapping[str, SampleCounts], scales: Sequence[Scale] = ()) -> list[str]:
    """Return warnings about variables, and about splits whose labels are all alike or whose samples have no event.

    Args:
        train: moments of the train split's variables.
        splits: counts of each split of a task; none without labels.
        scales: of variables in the files or at the sites of the input.
    """
    return [
        *_warn_of_outliers(train),
        *_warn_of_constants(train),
        *warn_of_scales(scales),
        *warn_of_splits(splits),
    ]


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


def warn_of_scales(scales: Sequence[Scale]) -> list[str]:
    """Return a warning where the medians of a variable are a factor apart between files or sites."""
    apart = [
        f"{name!r} ({ratio:.3g} times as high in {high if high != low else f'a part of {high}'} as in "
        f"{low if high != low else 'another'})"
        for name, ratio, high, low in compare_scales(scales)
    ]
    advice = "where units differ, convert them, or give the variables names of their own"
    return [f"medians of files or sites a factor apart: {_join_some(apart)}; {advice}"] if apart else []


def warn_of_splits(splits: Mapping[str, SampleCounts]) -> list[str]:
    """Return warnings about samples of a task without events, and splits that lack labels, or a class of them."""
    empty = sum(counts.num_without_events for counts in splits.values())
    warnings = [f"{empty:,} samples have no event before their prediction time"] if empty else []
    if not any(counts.num_labelled for counts in splits.values()):
        return warnings
    advice = "look at --split_fractions"
    used = {split: counts for split, counts in splits.items() if counts.num_samples}
    for split, counts in (used if len(used) == 1 else splits).items():  # all in one split: --like, or on purpose
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


def warn_of_strangers(task: Task, labels: Labels, names: Iterable[pl.Series] | None) -> list[str]:
    """Return a warning where labels name patients that the data set does not have, and say where ids nearly agree.

    Ids nearly agree that differ in zeros before them or in the case of letters alone.  ``names`` are those of the data
    set's patients; None = they are pseudonyms, of which nobody can say so.
    """
    if not task.labels_without_patient:
        return []
    message = f"{task.labels_without_patient:,} labels name no patient of the data set, and are left out"
    near = count_similar_strangers(labels.samples, names) if names is not None else 0
    hint = f"; {near:,} of their ids differ from one of the data set in leading zeros or case alone" if near else ""
    return [message + hint]


def name_some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return _join_some([repr(name) for name in names])


def _join_some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - MAX_NAMED:,} more" if len(texts) > MAX_NAMED else ""
    return ", ".join(texts[:MAX_NAMED]) + more
