"""Rules that need a patient's events together, applied to the sorted events of a partition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare.rules import Action, Limits

FEW: Final = 8
"""Where fewer than one of so many events are left to compare, they are picked out."""


@dataclass(slots=True)
class EventFilter:
    """Events that are still kept: ``patient``, ``set``, ``variable``, ``value``, ``minute``, ``position``.

    They are in the order of ``pipeline.prepare.sort``; ``rejected`` holds the same columns by reason.  Events that are
    merged of several have a column ``last_minute`` too, before which their value was not known.
    """

    kept: pl.DataFrame
    rejected: dict[str, pl.DataFrame] = field(default_factory=dict)
    num_clipped: int = 0  # values that were changed

    def drop(self, reason: str, which: npt.NDArray[np.bool_]) -> None:
        """Reject the kept events for which ``which`` [E] is true."""
        if which.any():
            self.rejected[reason] = self.kept.filter(pl.Series(which))
            self.kept = self.kept.filter(pl.Series(~which))

    def limit(self, variables: list[str], limits: Limits, action: Action) -> None:
        """Reject or clip values outside of the limits."""
        bounds = np.array([limits.get(variable, (-math.inf, math.inf)) for variable in variables]).reshape(-1, 2)
        low, high = bounds[self.kept["variable"].to_numpy()].T
        value = self.kept["value"].to_numpy()
        outside = (value < low) | (value > high)  # false where there is no number
        if action == "reject":
            self.drop("outlier", outside)
        else:
            self.num_clipped += int(outside.sum())
            self.kept = self.kept.with_columns(pl.Series("value", value.clip(low, high).astype(np.float32)))

    def aggregate(self, how: Literal["mean", "last"]) -> None:
        """Leave one event of each variable of a set: the mean of its numbers, or its last number.

        Of several numbers at the last minute the maximum is the last.  The set keeps its minimum minute.
        """
        is_merged = equals_previous(self.kept, ["patient", "set", "variable"])
        start = np.flatnonzero(~is_merged)
        if not is_merged.any():
            return
        value, minute = self.kept["value"].to_numpy(), self.kept["minute"].to_numpy()
        is_number = ~np.isnan(value)
        min_minute, max_minute = np.minimum.reduceat(minute, start), np.maximum.reduceat(minute, start)
        if how == "mean":
            total = np.add.reduceat(np.where(is_number, value, 0.0), start, dtype=np.float64)
            with np.errstate(invalid="ignore"):  # 0 / 0: no number at all
                merged = (total / np.add.reduceat(is_number, start, dtype=np.int64)).astype(np.float32)
        else:
            order = np.lexsort((value, minute, is_number, np.cumsum(~is_merged)))
            remaining = order[np.append(start[1:], len(value)) - 1]
            merged = value[remaining]
            is_merged[start] = True
            is_merged[remaining] = False
        self.drop("aggregated", is_merged)
        columns = {"value": merged, "minute": min_minute, "last_minute": max_minute}
        self.kept = self.kept.with_columns(pl.Series(name, column) for name, column in columns.items())

    def drop_short(self, min_events: int) -> None:
        """Reject all events of patients that have fewer than ``min_events``."""
        patient = self.kept["patient"].to_numpy()
        self.drop("short_patient", (np.bincount(patient) < min_events)[patient])


def equals_previous(events: pl.DataFrame, columns: list[str]) -> npt.NDArray[np.bool_]:
    """Return [E] whether an event equals the one before it in all ``columns``; NaN equals NaN."""
    equal = np.ones(events.height, dtype=np.bool_)
    equal[:1] = False
    for name in columns:
        column: npt.NDArray[Any] = events[name].to_numpy()
        if np.count_nonzero(equal) * FEW < len(equal):  # mostly no others are left
            rows = np.flatnonzero(equal)
            equal[rows] = _equals(column[rows - 1], column[rows])
        else:
            equal[1:] &= _equals(column[:-1], column[1:])
    return equal


def _equals(previous: npt.NDArray[Any], current: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return where values are equal; NaN equals NaN."""
    same: npt.NDArray[np.bool_] = previous == current
    if current.dtype.kind == "f" and np.isnan(current.min(initial=0)):
        same |= np.isnan(previous) & np.isnan(current)
    return same
