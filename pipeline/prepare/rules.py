"""Rules that decide which events count, besides whether a row can be used at all (``pipeline.prepare.clean``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias, get_args

import numpy as np
import polars as pl

from pipeline.options import Section, option
from pipeline.prepare.moments import Moments
from pipeline.prepare.sources.reading import FILE, ROW, as_text
from pipeline.prepare.sources.side_files import read_keyed_frame
from pipeline.schema import FLOAT32_MAX, VALUE, VARIABLE, UserError

Aggregate: TypeAlias = Literal["none", "mean", "last"]
Action: TypeAlias = Literal["clip", "reject"]
Limits: TypeAlias = Mapping[str, tuple[float, float]]
"""Minimum and maximum value, by variable."""

ACTIONS: Final[tuple[Action, ...]] = get_args(Action)


class Range(NamedTuple):
    """Possible values of a variable; minus or plus infinity = no limit."""

    low: float
    high: float
    action: Action


def read_ranges(path: str | Path) -> dict[str, Range]:
    """Return possible values by variable, from a CSV of ``variable``, ``low``, ``high`` and perhaps ``action``.

    An empty limit is none; an empty action is ``reject``.  A row that makes no sense is a UserError.
    """
    frame = read_keyed_frame(Path(path), (VARIABLE, "low", "high"), "variable,low,high,action")
    ranges = {}
    for row in frame.iter_rows(named=True):
        try:
            low = float(row["low"]) if row["low"] else -math.inf
            high = float(row["high"]) if row["high"] else math.inf
        except ValueError:
            low = high = math.nan
        action = row.get("action") or "reject"
        if not (low <= high and low <= FLOAT32_MAX and high >= -FLOAT32_MAX) or action not in ACTIONS:
            rules = "low and high are float32 numbers or empty, low is not above high, action is clip or reject"
            raise UserError(f"{path}: the row of {row[VARIABLE]!r} is no range; {rules}")
        ranges[row[VARIABLE]] = Range(low, high, action)
    return ranges


@dataclass(frozen=True, kw_only=True)
class Rules(Section):
    """Rules for events, in the order in which they hold; with --like those of that data set hold."""

    ranges: Mapping[str, Range] = option(dict, "CSV file of variable, low, high and perhaps action.", parse=read_ranges)
    outlier_std: float | None = option(None, "Distance of outliers from the mean, in standard deviations.", above=0)
    outlier_action: Action = option("reject", "What is done with an outlier; needs --outlier_std.")
    aggregate: Aggregate = option("none", "Merge events of one variable in one set to their mean or to the last.")
    min_events: int = option(1, "Patients with fewer events are left out.", minimum=1)
    min_count: int = option(1, "Variables with fewer events in the train split get the unknown code.", minimum=1)

    @property
    def options(self) -> dict[str, Any]:
        """Return the rules as the manifest holds them; JSON has no infinity, so null is a limit that there is not."""
        ranges = {
            name: [None if value in (-math.inf, math.inf) else value for value in self.ranges[name]]
            for name in sorted(self.ranges)
        }
        return vars(self) | {"ranges": ranges}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the rules that a manifest's options hold among others."""
        ranges = {
            name: Range(-math.inf if low is None else low, math.inf if high is None else high, action)
            for name, (low, high, action) in options["ranges"].items()
        }
        return cls(**{rule.name: options[rule.name] for rule in fields(cls)} | {"ranges": ranges})


def compute_outlier_limits(train: Moments, rules: Rules) -> dict[str, tuple[float, float]]:
    """Return the limits (low, high) of each variable that has a standard deviation and is not too rare."""
    if rules.outlier_std is None:
        return {}
    distance = rules.outlier_std * train.std
    low, high = train.mean - distance, train.mean + distance
    known = np.flatnonzero((train.count >= rules.min_count) & (low < high))
    return {train.variables[number]: (float(low[number]), float(high[number])) for number in known}


def apply_ranges(kept: pl.DataFrame, ranges: Mapping[str, Range]) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Return the rows that ``--ranges`` still keeps, those rejected, and the number of clipped values."""
    variables = kept.schema[VARIABLE]
    assert isinstance(variables, pl.Enum)
    limits = [(name, *ranges[name]) for name in variables.categories if name in ranges]
    schema: dict[str, Any] = {VARIABLE: variables, "low": pl.Float32, "high": pl.Float32, "action": pl.Enum(ACTIONS)}
    known = pl.DataFrame(limits, schema=schema, orient="row")
    value, clips = pl.col(VALUE), pl.col("action") == "clip"
    outside = ((value < pl.col("low")) | (value > pl.col("high"))).fill_null(False)
    rows = kept.join(known, on=VARIABLE, how="left", maintain_order="left")
    rows = rows.with_columns(outside=outside & ~clips, clipped=outside & clips)
    rejected = rows.filter("outside").select(pl.lit("out_of_range").alias("reason"), FILE, ROW, *as_text(rows))
    within = pl.when("clipped").then(value.clip("low", "high")).otherwise(value).alias(VALUE)
    remaining = rows.filter(~pl.col("outside")).with_columns(within).select(kept.columns)
    return remaining, rejected, int(rows["clipped"].sum())
