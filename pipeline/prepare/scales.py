"""Whether a variable is on one scale at all sites, or its unit is another at some: the medians of each site tell.

A site is what a column of the input says, such as a hospital, or else a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.prepare import names
from pipeline.prepare.arrow_files import read_table, write_table
from pipeline.prepare.sources.reading import FILE, SITE
from pipeline.schema import PATIENT_ID, VALUE, VARIABLE

SAMPLED_ROWS: Final = 1 << 15
SAMPLED_ROWS_OF_SITES: Final = 1 << 17
"""Maximum number of rows of a spill that are looked at; more where a column names sites, many of which share a file."""

MIN_VALUES: Final = 100
MIN_PATIENTS: Final = 10
"""Minimum numbers of values and of patients whose quartiles say something of a scale."""

MIN_RATIO: Final = 2.0
"""Minimum ratio of medians that is no chance: pounds are 2.2 kilograms, °F 2.7 °C, mg/dL of glucose 18 mmol/L."""


SCALE_SCHEMA: Final = pa.schema(
    {"site": pa.string(), "variable": pa.string(), "low": pa.float64(), "median": pa.float64(), "high": pa.float64()}
)


@dataclass(frozen=True, slots=True)
class Scale:
    """The quartiles of a variable's values in the rows of a site.

    It is the site that a column names, a file, or a folder of patients' files.
    """

    site: str
    variable: str
    low: float
    median: float
    high: float


def measure_scales(kept: pl.DataFrame, files: Sequence[str]) -> list[Scale]:
    """Return the scales of variables with enough values in a sample of the kept rows.

    ``files`` [F] are the sites of rows that name none themselves.
    """
    has_sites = SITE in kept.columns
    rows = kept.select(FILE, PATIENT_ID, VARIABLE, VALUE, *([SITE] if has_sites else []))
    max_rows = SAMPLED_ROWS_OF_SITES if has_sites else SAMPLED_ROWS
    if rows.height > max_rows:
        rows = rows[np.random.default_rng(0).integers(0, rows.height, max_rows)]
    # Names, which group in a tenth of the time that texts take.
    site = pl.Series(SITE, files, dtype=pl.Enum(list(dict.fromkeys(files)))).gather(rows[FILE])
    if has_sites:
        named = pl.format("site {}", rows[SITE].cast(pl.String)).fill_null(site.cast(pl.String))
        site = names.encode(pl.select(named).to_series().alias(SITE))
    value = pl.col(VALUE).cast(pl.Float64)
    quartiles = [value.quantile(part).alias(name) for name, part in (("low", 0.25), ("median", 0.5), ("high", 0.75))]
    groups = rows.with_columns(site, pl.col(PATIENT_ID).to_physical()).drop_nulls(VALUE)
    measured = groups.group_by(SITE, VARIABLE).agg(
        pl.len(), pl.col(PATIENT_ID).n_unique().alias("patients"), *quartiles
    )
    enough = measured.filter(pl.col("len") >= MIN_VALUES, pl.col("patients") >= MIN_PATIENTS)
    scales = enough.select(pl.col(SITE, VARIABLE).cast(pl.String), "low", "median", "high").sort(SITE, VARIABLE)
    return [Scale(*row) for row in scales.iter_rows()]


def save_scales(scales: Sequence[Scale], path: Path) -> None:
    """Write scales to a file, whole or not at all."""
    columns = [[getattr(scale, field.name) for scale in scales] for field in SCALE_SCHEMA]
    write_table(path, pa.table(dict(zip(SCALE_SCHEMA.names, columns, strict=True)), schema=SCALE_SCHEMA))


def load_scales(path: Path) -> list[Scale]:
    """Return scales that :func:`save_scales` wrote."""
    return [Scale(**row) for row in read_table(path).to_pylist()]


def merge_scales(paths: Sequence[Path], target: Path) -> None:
    """Write to ``target``, of the scales in files, those that :func:`compare_scales` looks at."""
    save_scales(pick_extremes(chain.from_iterable(map(load_scales, paths))), target)


def pick_extremes(scales: Iterable[Scale]) -> list[Scale]:
    """Return of each variable the scales of the least and of the largest median, by amount; the first of equals."""
    found: dict[str, tuple[Scale, Scale]] = {}
    for scale in scales:
        few, many = found.get(scale.variable, (scale, scale))
        found[scale.variable] = (
            min(few, scale, key=_amount),
            max(many, scale, key=_amount),
        )
    return list(dict.fromkeys(chain.from_iterable(found.values())))


def _amount(scale: Scale) -> float:
    return abs(scale.median)


def compare_scales(scales: Sequence[Scale]) -> list[tuple[str, float, str, str]]:
    """Return the variables whose medians are a factor apart, largest first: name, ratio, and the two sites.

    Their values must be apart too: the upper quartile of one below the lower quartile of the other.
    """
    found = []
    by_variable: dict[str, list[Scale]] = {}
    for scale in scales:
        by_variable.setdefault(scale.variable, []).append(scale)
    for variable, group in by_variable.items():
        few, many = (pick(group, key=_amount) for pick in (min, max))
        ratio = many.median / few.median if few.median else 0.0
        are_apart = few.high < many.low or many.high < few.low
        if ratio >= MIN_RATIO and are_apart:
            found.append((variable, ratio, many.site, few.site))
    return sorted(found, key=lambda each: (-each[1], each[0]))
