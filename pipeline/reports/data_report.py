"""Self-contained HTML reports of a data directory and of a run: one file, no script, nothing loaded from elsewhere.

Text from data (variables, options, messages) is escaped and stands in tables only; figures are SVG images whose
words are ours, so that no name can break a page or a plot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import FlatPatients, read_shard
from pipeline.dataset.tables import read_index, read_vocabulary
from pipeline.reports.page import (
    Share,
    Spread,
    flatten,
    histogram,
    preformatted,
    read_summary,
    section,
    table,
    write_page,
)
from pipeline.sampling.plan import plan_epoch
from pipeline.sampling.policy import Policy
from pipeline.sampling.quality import padding_waste
from pipeline.schema import FIRST_CODE, SPLITS, SUMMARY_FILE

Floats = npt.NDArray[np.float64]

BATCH_SIZES = (4, 8, 16, 32, 64)

MAX_VARIABLES = 300
"""Rows of the table of variables; the whole vocabulary is in its own file."""

NAME_LENGTH = 100
"""Most characters of a variable's name that are shown."""

EVENTS_LOOKED_AT = 1 << 21
"""Shards are read for the values' ranges until they hold as many; they hold patients at random."""

PATIENTS_PLANNED = 1 << 16
"""Most patients that padding is worked out for."""

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)

SPREAD_REACH = 4.0
"""Standard deviations on each side of the mean that the bar of a variable shows."""


def write_data_report(directory: Path) -> Path:
    """Write ``directory/report.html`` about the data that preprocess put there; its path.

    Raises:
        UserError: manifest, index, vocabulary or a shard is missing or damaged.
    """
    manifest = Manifest.load(directory)
    index, vocabulary = read_index(directory, manifest), read_vocabulary(directory, manifest)
    summary = read_summary(directory / SUMMARY_FILE)
    split = next((name for name in SPLITS if manifest.splits.get(name)), "train")
    shards = _some_shards(directory, manifest, split)
    rejects, unknown = (summary.pop(name, None) or {} for name in ("rejects", "unknown_variables"))
    headline = {
        "Patients": index.num_rows,
        "Sets": sum(entry.num_sets for entries in manifest.splits.values() for entry in entries),
        "Events": sum(entry.num_events for entries in manifest.splits.values() for entry in entries),
        "Rejected rows": sum(rejects.values()),
        "Variables with events": int((vocabulary["count"].to_numpy() > 0).sum()),
        "Shards": sum(len(entries) for entries in manifest.splits.values()),
        "MiB of shards": sum(entry.num_bytes for entry in manifest.all_shards()) / 2**20,
    }
    looked_at = (
        f"{len(shards)} of {len(manifest.splits.get(split, []))} shards of the {split} split, "
        f"{sum(len(shard.code) for shard in shards):,} events"
    )
    set_sizes = np.concatenate([np.diff(shard.set_offsets) for shard in shards] or [np.zeros(0, np.int64)])
    lengths = (
        histogram("Events of a patient", index["num_events"].to_numpy(), "patients"),
        histogram("Sets of a patient", index["num_sets"].to_numpy(), "patients"),
        histogram("Events of a set", set_sizes, "sets"),
        histogram("Events of a patient's largest set", index["max_set_size"].to_numpy(), "patients"),
    )
    counted_in = "the data set that --like named" if manifest.options.get("like") else "the train split"
    variables_note = (
        f"The most frequent first. Events, mean and std are of {counted_in}. Values are of {looked_at}; the bar spans "
        f"{SPREAD_REACH:g} std on each side of the mean: all values pale, 5 to 95 % darker, the median a mark."
    )
    sections = [
        section("Splits", _splits_table(index), "A patient without a label is unlabelled, not negative."),
        section("Lengths", f'<div class="plots">{"".join(lengths)}</div>', f"Of a set: {looked_at}."),
        *_waste_sections(index.filter(pc.equal(index["split"], split)), split),
        section("Rejected rows", *_rejects_table(rejects, summary.get("events_in"))),
        section("Variables", _variables_table(vocabulary, shards), variables_note),
    ]
    if unknown:
        sections.append(section("Unknown variables", table(("variable", "events"), unknown.items())))
    sections += [
        section("Summary", table((), flatten(summary))),
        section("Options", preformatted(json.dumps(manifest.options, indent=1, ensure_ascii=False))),
    ]
    return write_page(directory, "Data report", headline, sections)


# Parts of the data report.


def _some_shards(directory: Path, manifest: Manifest, split: str) -> list[FlatPatients]:
    """The first shards of a split, until ``EVENTS_LOOKED_AT``."""
    shards, num_events = list[FlatPatients](), 0
    for entry in manifest.splits.get(split, []):
        if num_events >= EVENTS_LOOKED_AT:
            break
        shards.append(read_shard(directory, entry))
        num_events += entry.num_events
    return shards


def _splits_table(index: pa.Table) -> str:
    rows: list[list[Any]] = []
    names = index["split"].unique().to_pylist()
    for name in sorted(names, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)):
        chosen = index.filter(pc.equal(index["split"], name))
        patients, labelled = chosen.num_rows, chosen.num_rows - chosen["label"].null_count
        positive = pc.sum(chosen["label"], min_count=0).as_py()
        sums = [pc.sum(chosen[column]).as_py() for column in ("num_sets", "num_events")]
        rate = Share(positive / labelled) if labelled else None
        rows.append([name, patients, Share(patients / index.num_rows), *sums, labelled, positive, rate])
    return table(("split", "patients", "share", "sets", "events", "labelled", "positive", "positive rate"), rows)


def _waste_sections(index: pa.Table, split: str) -> list[str]:
    """Padding waste of one epoch of a split's patients, of events and of sets, by policy and batch size."""
    if not index.num_rows:
        return []
    every = -(-index.num_rows // PATIENTS_PLANNED)
    num_events, num_sets = (index[column].to_numpy()[::every] for column in ("num_events", "num_sets"))
    wastes: dict[str, list[tuple[float, float]]] = {}
    for batch_size in BATCH_SIZES:
        policies = {
            "at random": Policy(batch_size=batch_size, bucketing=False),
            "bucketed by events (the default)": Policy(batch_size=batch_size),
            "sorted by events": Policy(batch_size=batch_size, bucket_width=0),
        }
        for name, policy in policies.items():
            plan = plan_epoch(num_events, num_sets, policy, seed=0, epoch=0)
            waste = padding_waste(plan, num_events), padding_waste(plan, num_sets)
            wastes.setdefault(name, []).append(waste)
    note = f"Padded cells ÷ all cells of the padded layout, {split} split; the ragged layout has none."
    if every > 1:
        note += f" Of one patient in {every}: with all of them, bucketing wastes less."
    header = ("batches", *(f"{batch_size} patients" for batch_size in BATCH_SIZES))
    return [
        section(
            f"Expected padding waste of {axis}",
            table(header, [(name, *(Share(waste[place]) for waste in row)) for name, row in wastes.items()]),
            note,
        )
        for place, axis in enumerate(("events", "sets"))
    ]


def _rejects_table(rejects: dict[str, int], events_in: int | None) -> tuple[str, str]:
    """Rows by reason, and what they are of."""
    total = sum(rejects.values())
    if not total:
        return "", "None."
    by_count = sorted(rejects.items(), key=lambda reason: (-reason[1], reason[0]))
    of_all = f" of {events_in:,} ({total / events_in:.3%})" if events_in else ""
    header = ("reason", "rows", "share of rejects")
    return table(header, [(*reason, Share(reason[1] / total)) for reason in by_count]), f"{total:,} rows{of_all}."


def _variables_table(vocabulary: pa.Table, shards: list[FlatPatients]) -> str:
    """How many events each variable has, and where the values of ``shards`` lie, raw."""
    count, mean, std = (vocabulary[name].to_numpy() for name in ("count", "mean", "std"))
    scaled = _quantiles(shards, vocabulary.num_rows)
    raw = scaled * std[:, None] + mean[:, None]
    raw[np.abs(raw) < 1e-6 * np.abs(mean[:, None])] = 0.0  # what float32 leaves of zero
    places = ((scaled + SPREAD_REACH) / (2 * SPREAD_REACH)).clip(0.01, 0.99)
    variables = vocabulary["variable"].to_pylist()
    rows = []
    for code in np.lexsort((np.arange(len(count)), -count)).tolist()[:MAX_VARIABLES]:
        numbers = (mean[code], std[code], *raw[code, [0, 2, 4]])
        spread = Spread(*places[code].tolist()) if np.isfinite(scaled[code, 0]) else None
        share = Share(count[code] / max(1, count.sum()))
        name = variables[code] if len(variables[code]) <= NAME_LENGTH else f"{variables[code][:NAME_LENGTH]}…"
        rows.append((name, code, int(count[code]), share, *map(float, numbers), spread))
    header = ("variable", "code", "events", "share", "mean", "std", "least", "median", "greatest", "values")
    rest = len(count) - MAX_VARIABLES
    note = f"<p>and {rest:,} more in vocabulary.parquet</p>" if rest > 0 else ""
    plot = histogram("Events of a variable", count[count > 0], "variables")
    return f'<div class="plots">{plot}</div>{table(header, rows)}{note}'


def _quantiles(shards: list[FlatPatients], num_codes: int) -> Floats:
    """[num_codes, Q] of the scaled values of each code; NaN where it has none, and of unknown variables."""
    keys = []
    for shard in shards:
        chosen = shard.has_value & (shard.code >= FIRST_CODE)
        bits = shard.value[chosen].view(np.uint32)
        ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # as the floats they are the bits of
        keys.append(shard.code[chosen].astype(np.uint64) << np.uint64(32) | ordered)
    key = np.sort(np.concatenate([*keys, np.zeros(0, np.uint64)]))  # a tenth of the time of sorting two columns
    count = np.bincount((key >> np.uint64(32)).astype(np.int64), minlength=num_codes)
    place = np.rint(np.array(QUANTILES) * (count[:, None] - 1)).astype(np.int64)
    found = np.full((num_codes, len(QUANTILES)), np.nan)
    there = count > 0
    ordered = key[(np.cumsum(count) - count)[there, None] + place[there]].astype(np.uint32)
    found[there] = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered).view(np.float32)
    return found


# Figures of the run report.


# Summaries.
