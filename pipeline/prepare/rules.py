"""Rules that decide which events count, beside whether a row can be used at all (``pipeline.prepare.clean``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare.moments import Moments
from pipeline.prepare.sources.source import FILE, ROW
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE

Aggregate: TypeAlias = Literal["none", "mean", "last"]
Action: TypeAlias = Literal["clip", "reject"]
Limits: TypeAlias = Mapping[str, tuple[float, float]]
"""Least and greatest value, by variable."""
Bools: TypeAlias = npt.NDArray[np.bool_]

AGGREGATES: Final[tuple[Aggregate, ...]] = get_args(Aggregate)
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Values of a variable that can be; minus or plus infinity = no limit."""

    low: float
    high: float
    action: Action


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """In the order in which they hold.

    Attributes:
        ranges: by variable; before duplicates are looked for.
        outlier_std: values further than this many standard deviations from the mean are outliers; both of the train
            split's events that ``ranges`` leave.
        outlier_action: what is done with an outlier.
        aggregate: several events of one variable in one set stay, or become their mean, or the last.
        min_events: patients with fewer events are left out.
        min_count: variables with fewer events in the train split are unknown, and have no outliers.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    outlier_std: float | None = None
    outlier_action: Action = "reject"
    aggregate: Aggregate = "none"
    min_events: int = 1
    min_count: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """As the manifest has them."""
        return {
            **{rule.name: getattr(self, rule.name) for rule in fields(self)},
            "ranges": {
                name: [None if math.isinf(limit) else limit for limit in (allowed.low, allowed.high)] + [allowed.action]
                for name, allowed in sorted(self.ranges.items())
            },
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Back from a manifest; it may hold other options too."""
        ranges = {
            name: Range(low=-math.inf if low is None else low, high=math.inf if high is None else high, action=action)
            for name, (low, high, action) in options["ranges"].items()
        }
        return cls(**{rule.name: options[rule.name] for rule in fields(cls)} | {"ranges": ranges})


def outlier_limits(train: Moments, rules: Rules) -> dict[str, tuple[float, float]]:
    """Of each variable that has a standard deviation and is not too rare; none where no rule asks for them."""
    if rules.outlier_std is None:
        return {}
    reach = rules.outlier_std * train.std
    bounds = zip(train.variables, (train.mean - reach).tolist(), (train.mean + reach).tolist(), strict=True)
    frequent = train.count >= rules.min_count
    return {
        name: (low, high) for (name, low, high), known in zip(bounds, frequent, strict=True) if known and low < high
    }


def apply_ranges(kept: pl.DataFrame, ranges: Mapping[str, Range]) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Of the rows that ``pipeline.prepare.clean`` keeps: those still kept, those rejected, and how many values are
    clipped.
    """
    variables = kept.schema[VARIABLE]
    assert isinstance(variables, pl.Enum)
    known = pl.DataFrame(
        [
            (name, ranges[name].low, ranges[name].high, ranges[name].action == "clip")
            for name in variables.categories
            if name in ranges
        ],
        schema={VARIABLE: variables, "low": pl.Float32, "high": pl.Float32, "clips": pl.Boolean},
        orient="row",
    )
    rows = kept.join(known, on=VARIABLE, how="left", maintain_order="left")
    value = pl.col(VALUE)
    outside = ((value < pl.col("low")) | (value > pl.col("high"))).fill_null(False)
    rows = rows.with_columns(outside=outside & ~pl.col("clips"), clipped=outside & pl.col("clips"))
    rejected = rows.filter("outside").select(
        pl.lit("out_of_range").alias("reason"), FILE, ROW, pl.col(PATIENT_ID, MINUTE, VARIABLE, VALUE).cast(pl.String)
    )
    within = pl.when("clipped").then(value.clip("low", "high")).otherwise(value).alias(VALUE)
    remaining = rows.filter(~pl.col("outside")).with_columns(within).select(kept.columns)
    return remaining, rejected, int(rows["clipped"].sum())


@dataclass(slots=True)
class Sieve:
    """Events that are still kept, and those that are not, by reason.

    Attributes:
        kept: ``patient``, ``set``, ``variable``, ``value``, ``minute``, ``position``, as
        ``pipeline.prepare.partition`` sorts.
        rejected: the same columns.
        num_clipped: values that were changed.
    """

    kept: pl.DataFrame
    rejected: dict[str, pl.DataFrame] = field(default_factory=dict)
    num_clipped: int = 0

    def drop(self, reason: str, which: Bools) -> None:
        """Reject those of the kept events ``which`` is true for."""
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
            clipped = value.clip(low, high).astype(np.float32)
            self.kept = self.kept.with_columns(pl.Series("value", clipped))

    def aggregate(self, how: Literal["mean", "last"]) -> None:
        """Leave one event of each variable of a set: the mean of its numbers, or its last number.

        Of numbers at the last minute the greatest is the last.  The set keeps its least minute.
        """
        first = ~repeats(self.kept, ["patient", "set", "variable"])
        start = np.flatnonzero(first)
        if len(start) == len(first):
            return
        value, minute = self.kept["value"].to_numpy(), self.kept["minute"].to_numpy()
        is_number = ~np.isnan(value)
        if how == "mean":
            total = np.add.reduceat(np.where(is_number, value, 0.0), start, dtype=np.float64)
            with np.errstate(invalid="ignore"):  # 0 / 0: no number at all
                merged = (total / np.add.reduceat(is_number, start, dtype=np.int64)).astype(np.float32)
            stays = start
        else:
            order = np.lexsort((value, minute, is_number, np.cumsum(first)))
            stays = order[np.append(start[1:], len(first)) - 1]
            merged = value[stays]
        others = np.ones(len(first), dtype=np.bool_)
        others[stays] = False
        least = np.minimum.reduceat(minute, start)
        self.drop("aggregated", others)
        self.kept = self.kept.with_columns(pl.Series("value", merged), pl.Series("minute", least))

    def drop_short(self, min_events: int) -> None:
        """Reject all events of patients that have fewer than ``min_events``."""
        patient = self.kept["patient"].to_numpy()
        self.drop("short_patient", (np.bincount(patient) < min_events)[patient])


def repeats(events: pl.DataFrame, columns: list[str]) -> Bools:
    """[E] whether an event equals the one before it in all ``columns``; NaN equals NaN."""
    found = np.ones(events.height, dtype=np.bool_)
    found[:1] = False
    for name in columns:
        column: npt.NDArray[Any] = events[name].to_numpy()
        before, after = column[:-1], column[1:]
        same = before == after
        if column.dtype.kind == "f":
            same |= np.isnan(before) & np.isnan(after)
        found[1:] &= same
    return found
