"""Arithmetic on flat arrays: sizes, offsets, ranges and labels, without a loop over the parts."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.schema import UNLABELLED

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

CACHED_NUMBERS = 1 << 17  # 1 MB of int64


def offsets_from_sizes(sizes: npt.NDArray[Any]) -> Ints:
    """Return the [N+1] int64 offsets of parts of the given sizes [N]: part ``i`` is ``offsets[i]:offsets[i+1]``."""
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def find_runs(values: npt.NDArray[Any]) -> Ints:
    """Return where runs of equal values begin, in order."""
    begins = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return np.flatnonzero(begins)


def choose_evenly(number: int, most: int) -> Ints:
    """Return at most so many positions among ``number``, evenly spread, the first and the last included."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.int64))


def is_labelled(label: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return where there is a label, in the shape of ``label``: not -1 of integers, not NaN of floats."""
    known: npt.NDArray[np.bool_] = ~np.isnan(label) if label.dtype.kind == "f" else label != UNLABELLED
    return known


def harden(label: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the classes that soft labels count as wherever something is measured: 1 from one half on; NaN stays."""
    return np.where(np.isnan(label), label, label >= 0.5) if label.dtype.kind == "f" else label


def concatenate_ranges(starts: Ints, sizes: Ints) -> Ints:
    """Return the ranges ``starts[i] : starts[i] + sizes[i]`` one after another, [sum of sizes] int64."""
    stops = np.cumsum(sizes)
    positions = np.repeat(starts - (stops - sizes), sizes)
    positions += _cached_numbers()[: len(positions)] if len(positions) <= CACHED_NUMBERS else np.arange(len(positions))
    return positions


@cache
def _cached_numbers() -> Ints:
    """Return 0, 1, 2 …; counting anew would take a third of the time of a short :func:`concatenate_ranges`."""
    return np.arange(CACHED_NUMBERS)
