"""The HTML report of a data directory: its splits, lengths, padding, rejected rows and variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Floats, Ints
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import FlatPatients, read_shard
from pipeline.dataset.tables import iterate_index, read_vocabulary
from pipeline.dataset.tasks import Task, describe_labels, find_tasks, iterate_task_table
from pipeline.reports.lengths import Lengths, find_medians
from pipeline.reports.page import draw_figure, read_object, write_page
from pipeline.sampling.plan import plan_epoch
from pipeline.sampling.policy import Policy
from pipeline.sampling.quality import padding_waste
from pipeline.schema import FIRST_CODE, REPORT_FILE, SPLITS, SUMMARY_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# The policies whose padding is compared, at each of these numbers of patients a batch.
POLICIES = {
    "at random": Policy(bucketing=False),
    "bucketed by events (the default)": Policy(),
    "sorted by events": Policy(bucket_width=0),
}
BATCH_SIZES = (4, 8, 16, 32, 64)
MAX_PATIENTS_PLANNED = 1 << 16

MAX_EVENTS_READ = 1 << 21  # shards, of patients in random order, are read for sizes and values up to so many events
MAX_VARIABLES = 300  # rows of a table; the whole vocabulary is in its own file
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SPREAD_REACH = 4  # standard deviations on each side of the mean that the bar of a variable spans

MAX_BINS = 40  # bars of a histogram
LOGARITHMIC_RATIO = 30  # of the largest to the smallest value, above which the axis of a histogram is logarithmic


def write_data_report(directory: Path) -> Path:
    """Write ``report.html`` of a data directory into it and return its path."""
    manifest = Manifest.load(directory)
    vocabulary = read_vocabulary(directory, manifest)
    split = next((name for name in SPLITS if manifest.splits.get(name)), "train")
    entries = manifest.splits.get(split, [])
    starts = accumulate((entry.num_events for entry in entries), initial=0)
    read = [entry for entry, start in zip(entries, starts, strict=False) if start < MAX_EVENTS_READ]
    shards = [read_shard(directory, entry) for entry in read]
    stride = max(1, -(-sum(entry.num_patients for entry in entries) // MAX_PATIENTS_PLANNED))
    lengths, planned = _read_lengths(directory, manifest, split, stride)
    lengths["set_size"] = Lengths(*(np.diff(shard.set_offsets) for shard in shards))
    counts = vocabulary.filter(pc.field("count") > 0)["count"]
    lengths["variable"] = Lengths(counts)
    return write_page(
        directory / REPORT_FILE,
        "data_report.html.jinja",
        name=directory.resolve().name,
        batch_sizes=BATCH_SIZES,
        draw_histograms=draw_histograms,
        lengths=lengths,
        manifest=manifest,
        num_counted=pc.sum(counts).as_py() or 0,
        max_variables=MAX_VARIABLES,
        reach=SPREAD_REACH,
        shards=shards,
        split=split,
        splits=[_count(name, manifest.splits[name]) for name in SPLITS if manifest.splits.get(name)],
        stride=stride,
        tasks=[describe_task(directory, task) for task in find_tasks(directory, manifest)],
        summary=read_object(directory / SUMMARY_FILE),
        variables=_describe_variables(vocabulary, shards),
        waste=_padding_waste(*planned),
    )


def _read_lengths(
    directory: Path, manifest: Manifest, split: str, stride: int
) -> tuple[dict[str, Lengths], tuple[Ints, Ints]]:
    """Return the lengths of all patients, and the numbers of events and of sets of one in ``stride`` of a split."""
    lengths = {name: Lengths() for name in ("num_events", "num_sets", "max_set_size")}
    planned, num_seen = [np.zeros((2, 0), np.int64)], 0
    for part in iterate_index(directory, manifest, "split", *lengths):
        for name, counted in lengths.items():
            counted.add(part[name])
        own = part.filter(pc.field("split") == split)
        planned.append(
            np.stack([own[name].to_numpy()[-num_seen % stride :: stride] for name in ("num_events", "num_sets")])
        )
        num_seen += own.num_rows
    num_events, num_sets = np.concatenate(planned, axis=1)
    return lengths, (num_events, num_sets)


def _count(split: str, entries: Sequence[ShardEntry]) -> dict[str, Any]:
    numbers = ("num_patients", "num_sets", "num_events")
    return {"split": split} | {name: sum(getattr(entry, name) for entry in entries) for name in numbers}


def describe_task(directory: Path, task: Task) -> list[dict[str, Any]]:
    """Return a row for each split of a task: counts, labels in words, samples a patient and median lengths."""
    num_events = {split: Lengths() for split in SPLITS}
    for split, samples in _iterate_splits(directory, task, "num_events"):
        num_events[split].add(samples["num_events"])
    minutes = find_medians(functools.partial(_iterate_minutes, directory, task)) if task.times else {}
    rows = []
    for split in SPLITS:
        counts = task.splits[split]
        if not len(num_events[split]):
            continue
        rows.append(
            dataclasses.asdict(counts)
            | {"task": task.name, "kind": task.kind, "split": split, "labels": describe_labels(task, [split])}
            | {"samples_per_patient": counts.num_samples / counts.num_patients}
            | {"median_events": num_events[split].median}
            | {"median_hours": minutes[split] / 60 if split in minutes else None}
        )
    return rows


def _iterate_minutes(directory: Path, task: Task) -> Iterator[tuple[str, Floats]]:
    for split, samples in _iterate_splits(directory, task, "prediction_minute"):
        yield split, samples["prediction_minute"].drop_null().to_numpy()


def _iterate_splits(directory: Path, task: Task, column: str) -> Iterator[tuple[str, pa.Table]]:
    """Yield some rows of a column of the table of a task at a time, all of one split."""
    for part in iterate_task_table(directory, task, "split", column):
        for split in SPLITS:
            if (own := part.filter(pc.field("split") == split)).num_rows:
                yield split, own


def _padding_waste(num_events: Ints, num_sets: Ints) -> dict[str, dict[str, list[float]]]:
    """Return the padding waste of ``events`` and of ``sets``, for each policy and batch size."""
    waste: dict[str, dict[str, list[float]]] = {"events": {}, "sets": {}}
    for name, policy in POLICIES.items():
        policies = [dataclasses.replace(policy, batch_size=size) for size in BATCH_SIZES]
        plans = [plan_epoch(num_events, num_sets, sized, seed=0, epoch=0) for sized in policies]
        waste["events"][name] = [padding_waste(plan, num_events) for plan in plans]
        waste["sets"][name] = [padding_waste(plan, num_sets) for plan in plans]
    return waste


def _describe_variables(vocabulary: pa.Table, shards: Sequence[FlatPatients]) -> list[dict[str, Any]]:
    """Return a row of the vocabulary for each of the most frequent variables, with the quantiles of its values.

    ``raw`` are the ``QUANTILES`` of its values in ``shards``, in the variable's own unit, and ``position`` where they
    lie, in per cent of the range of ``SPREAD_REACH`` standard deviations on each side of the mean.  A variable without
    values has neither.
    """
    chosen = [(shard, shard.has_value & (shard.code >= FIRST_CODE)) for shard in shards]
    code = np.concatenate([np.zeros(0, np.int64), *(shard.code[events] for shard, events in chosen)])
    value = np.concatenate([np.zeros(0), *(shard.value[events] for shard, events in chosen)])
    stops = np.bincount(code, minlength=vocabulary.num_rows).cumsum()
    by_code = np.split(value[np.argsort(code, kind="stable")], stops)
    rows = vocabulary.sort_by([("count", "descending"), ("code", "ascending")])[:MAX_VARIABLES].to_pylist()
    for row in rows:
        if len(values := by_code[row["code"]]):
            scaled = np.quantile(values, QUANTILES, method="nearest")
            raw = scaled * row["std"] + row["mean"]
            raw[np.abs(raw) < 1e-6 * abs(row["mean"])] = 0.0  # zero, but for the rounding of float32
            row |= {"raw": raw, "position": (50 + 50 * scaled / SPREAD_REACH).clip(1, 99)}
    return rows


def draw_histograms(lengths: Mapping[str, tuple[str, Lengths]]) -> str | None:
    """Return an image of a histogram for each title, of what is counted and its lengths; None without any lengths."""
    panels = {}
    for title, (counted, values) in lengths.items():
        if len(values):
            draw = functools.partial(draw_histogram, lengths=values, counted=counted)
            panels[f"{title}: median {values.median:,.4g}"] = draw
    return draw_figure(panels)


def draw_histogram(axis: Axes, *, lengths: Lengths, counted: str) -> None:
    """Draw how many of some lengths lie in each of at most ``MAX_BINS`` ranges.

    Every range holds a whole number, so that none is empty because it is narrow.
    """
    values, counts = lengths.distinct
    low, high = int(values[0]), int(values[-1])
    width = -(-(high + 1 - low) // MAX_BINS)
    edges = np.arange(low, high + 1 + width, width)
    if high > LOGARITHMIC_RATIO * low:
        edges = np.unique(np.rint(np.geomspace(low, high + 1, MAX_BINS + 1)))
        axis.set_xscale("log")
        axis.set_xticks(edges[:: max(1, len(edges) // 4)])
        axis.minorticks_off()
    axis.stairs(np.histogram(values, edges - 0.5, weights=counts)[0], edges - 0.5, fill=True)
    axis.set(ylabel=counted, ylim=(0, None))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:,.0f}")
