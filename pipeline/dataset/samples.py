"""Samples: what a plan is made of.  A sample is a whole patient, or a patient's events up to a prediction time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Ints, concatenate_ranges, find_runs, is_labelled, offsets_from_sizes
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.patients import ChosenPatients, is_chosen, patient_offsets
from pipeline.dataset.schemas import INDEX_SCHEMA, task_schema
from pipeline.dataset.tables import JoinedRows
from pipeline.dataset.tasks import Task
from pipeline.schema import INDEX_FILE, TIME_COLUMNS, UNLABELLED, UserError
from pipeline.storage.folder import Folder

_LENGTHS = pa.schema([INDEX_SCHEMA.field(name) for name in ("shard", "num_events", "num_sets")])

LENGTHS = ("num_events", "num_sets", "whole_sets")
"""The columns that say how long samples are."""

JOINED_ROWS = 1 << 20
"""Rows of tasks that are read at once where all of a split are gone through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSamples:
    """The samples [N] that share windows: those of window ``w`` are ``offsets[w]:offsets[w+1]``, the longest last.

    Attributes:
        offsets: [W+1] int64.
        num_sets: [N] int64, the first sets of its window that each sample has; of the longest at least all.
        label, prediction_time: as in :class:`Samples`.
    """

    offsets: Ints
    num_sets: Ints
    label: npt.NDArray[Any]
    prediction_time: npt.NDArray[Any] | None

    def of_windows(self, windows: Ints) -> tuple[Ints, Ints]:
        """Return [K] the samples of some windows, one window after another, and for each the position of its window."""
        first = self.offsets[windows]
        sizes = self.offsets[windows + 1] - first
        return concatenate_ranges(first, sizes), np.repeat(np.arange(len(windows)), sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The samples [N] of some shards that have events, in the order of the shards and of their rows.

    Attributes:
        patient: [N] the patient of each, as its row in these shards, one after another.
        num_events: [N] events up to the prediction time, at least 1.
        num_sets: [N] sets of these events.
        label: [N] int64, -1 = unlabelled; of a regression, and soft, float32, NaN = unlabelled; of T tasks [N, T]
            float32.
        whole_sets: [N] whether a sample's last set is whole, and is not cut by the prediction time.
        prediction_time: [N] datetime64[us], or float64 minutes; NaT or NaN = the whole patient.  None = all are whole.
        shared: the samples themselves, where these here are windows that samples share; None = each has its own.
    """

    patient: Ints
    num_events: Ints
    num_sets: Ints
    label: npt.NDArray[Any]
    whole_sets: npt.NDArray[np.bool_]
    prediction_time: npt.NDArray[Any] | None = None
    shared: SharedSamples | None = None


class SampleIndex:
    """The samples of a data set, read for some shards at a time: those of tasks, or without one the patients.

    A sample of several tasks has a label of each: a patient up to a time stands once, whichever tasks ask for it.  With
    ``chosen`` patients the others have no samples.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        tasks: tuple[Task, ...] = (),
        *,
        chosen: ChosenPatients | None = None,
        share: Callable[[Samples], Samples] | None = None,
        verify: bool = True,
    ) -> None:
        self.tasks, self._chosen, self._share, advice = tasks, chosen, share, "add the task again"
        files = [(task.table(verify=verify), advice, _sample_schema(task)) for task in tasks]
        if not tasks:
            files = [(manifest.file(INDEX_FILE, verify=verify), folder.repair_advice, _LENGTHS)]
        self._rows = [JoinedRows(folder, file, schema) for file, _, schema in files]
        self._damage = [f"{folder}/{file.name}: contradicts the manifest; {does}" for file, does, _ in files]
        if not all(file.sha256 for file, *_ in files):
            raise UserError(f"{folder}/{INDEX_FILE}: not in the manifest; run preprocess.py again")

    def count(self, entries: Sequence[ShardEntry]) -> Ints:
        """Return the number of samples of each shard.

        Nothing is read, unless several tasks share samples, samples share windows, or patients were chosen.
        """
        rows = [_count_rows(task, entries) for task in self.tasks or (None,)]
        if (len(rows) == 1 and self._chosen is None and self._share is None) or not len(entries):
            return rows[0]
        found = []
        for start, stop in cut_shards(np.sum(rows, axis=0)):
            some = entries[start:stop]
            shard = np.searchsorted(patient_offsets(some), self.read(some).patient, side="right") - 1
            found.append(np.bincount(shard, minlength=len(some)))
        return np.concatenate(found)

    def read(self, entries: Sequence[ShardEntry]) -> Samples:
        """Return the samples of some shards."""
        of_tasks = [self._read(number, task, entries) for number, task in enumerate(self.tasks or (None,))]
        samples = join_samples([choose_samples(each, entries, self._chosen) for each in of_tasks])
        return samples if self._share is None else self._share(samples)

    def _read(self, number: int, task: Task | None, entries: Sequence[ShardEntry]) -> Samples:
        """Return the samples of one task, or the patients, of some shards."""
        table, shard = self._rows[number].read([entry.path for entry in entries])
        if task is not None:
            has_events = pc.greater(table["num_events"], 0)
            table, shard = table.filter(has_events), shard[has_events.to_numpy()]
        num_events, num_sets = (table[name].to_numpy().astype(np.int64) for name in ("num_events", "num_sets"))
        patients = patient_offsets(entries)
        patient, time, whole_sets = np.arange(table.num_rows), None, np.ones(table.num_rows, np.bool_)
        label: npt.NDArray[Any] = np.full(table.num_rows, UNLABELLED, np.int64)
        if task is not None:
            patient = patients[shard] + table["position"].to_numpy()
            label, whole_sets = _read_labels(table["label"], task), table["whole_sets"].to_numpy()
            time = table[TIME_COLUMNS[task.times]].to_numpy() if task.times else None
        inside = (patient >= patients[shard]) & (patient < patients[shard + 1])
        lengths_fit = (num_sets >= 1) & (num_sets <= num_events)
        has_all = np.array_equal(np.bincount(shard, minlength=len(entries)), _count_rows(task, entries))
        if not has_all or not (inside & lengths_fit).all():
            raise UserError(self._damage[number])
        if task is None:
            sums = [np.bincount(shard, amount, len(entries)).tolist() for amount in (num_sets, num_events)]
            if sums != [[entry.num_sets for entry in entries], [entry.num_events for entry in entries]]:
                raise UserError(self._damage[number])
        lengths = {"num_events": num_events, "num_sets": num_sets, "whole_sets": whole_sets}
        return Samples(patient=patient, label=label, prediction_time=time, **lengths)


def choose_samples(samples: Samples, entries: Sequence[ShardEntry], chosen: ChosenPatients | None) -> Samples:
    """Return the samples of the chosen patients of some shards, of which they are the samples; None = of all."""
    if chosen is None:
        return samples
    keep, time = is_chosen(entries, chosen)[samples.patient], samples.prediction_time
    kept = {name: getattr(samples, name)[keep] for name in ("patient", "label", *LENGTHS)}
    return replace(samples, **kept, prediction_time=None if time is None else time[keep])


def cut_shards(num_samples: Ints) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of shards that have about ``JOINED_ROWS`` of all their ``num_samples`` [n] together."""
    part = np.cumsum(num_samples) // JOINED_ROWS
    bounds = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
    return ((start, stop) for start, stop in pairwise(bounds) if stop > start)


def read_empty_samples(
    folder: Folder, task: Task, entries: Sequence[ShardEntry], chosen: ChosenPatients | None, *, verify: bool = True
) -> pa.Table:
    """Return the rows of a task's samples of some shards, or of their chosen patients, that have no events.

    Some shards at a time are read, and none if the task has no such sample.
    """
    schema = task_schema(task.kind, soft=task.soft_labels)
    if not any(counts.num_without_events for counts in task.splits.values()):
        return schema.empty_table()
    rows, found = JoinedRows(folder, task.table(verify=verify), schema), [schema.empty_table()]
    for start, stop in cut_shards(_count_rows(task, entries)):
        some = entries[start:stop]
        table, shard = rows.read([entry.path for entry in some])
        keep = table["num_events"].to_numpy() == 0
        if chosen is not None:
            keep &= is_chosen(some, chosen)[patient_offsets(some)[shard] + table["position"].to_numpy()]
        found.append(table.filter(pa.array(keep)))
    return pa.concat_tables(found)


def _count_rows(task: Task | None, entries: Sequence[ShardEntry]) -> Ints:
    """Return the number of samples of one task, or of patients, in each shard, as its JSON or the manifest says."""
    counts = (entry.num_patients if task is None else task.shards.get(entry.path, 0) for entry in entries)
    return np.fromiter(counts, np.int64, len(entries))


def _sample_schema(task: Task) -> pa.Schema:
    schema = task_schema(task.kind, soft=task.soft_labels)
    return pa.schema([field for field in schema if field.name not in ("patient_id", "split")])


def _read_labels(column: pa.ChunkedArray, task: Task) -> npt.NDArray[Any]:
    if task.kind == "regression" or task.soft_labels:
        return column.cast(pa.float32()).to_numpy()
    label: Ints = pc.fill_null(column.cast(pa.int64()), UNLABELLED).to_numpy()
    return label


def join_samples(of_tasks: Sequence[Samples]) -> Samples:
    """Return the samples of several tasks over the same shards as one: in order of patient and time, each once."""
    if len(of_tasks) == 1:
        return of_tasks[0]
    times = [samples.prediction_time for samples in of_tasks if samples.prediction_time is not None]
    patient = np.concatenate([samples.patient for samples in of_tasks])
    time, rank = None, np.zeros(len(patient), np.int64)
    if times:
        whole = np.array(np.nan if times[0].dtype.kind == "f" else "NaT", times[0].dtype)
        given = ((samples, samples.prediction_time) for samples in of_tasks)
        time = np.concatenate([np.full(len(s.patient), whole) if own is None else own for s, own in given])
        rank = np.unique(time, return_inverse=True)[1]  # all that is no time is one, after all times
    order = np.lexsort((rank, patient))
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (np.diff(patient[order]) != 0) | (np.diff(rank[order]) != 0)
    row = np.empty(len(order), np.int64)
    row[order] = np.cumsum(is_first) - 1
    first = order[is_first]
    labels = np.full((len(first), len(of_tasks)), np.nan, np.float32)
    bounds = offsets_from_sizes(np.array([len(samples.patient) for samples in of_tasks], np.int64))
    for number, (samples, (start, stop)) in enumerate(zip(of_tasks, pairwise(bounds), strict=True)):
        labels[row[start:stop], number] = np.where(is_labelled(samples.label), samples.label, np.nan)
    lengths: dict[str, Any] = {name: np.concatenate([getattr(s, name) for s in of_tasks])[first] for name in LENGTHS}
    return Samples(
        patient=patient[first], label=labels, prediction_time=None if time is None else time[first], **lengths
    )


def share_windows(samples: Samples, max_events: int | None, *, keeps_earliest: bool) -> Samples:
    """Return the windows [W] of samples: those of a patient share one if they begin at the same event.

    Shorter samples of a window end between sets, so that they are its first sets.  A sample whose last set is cut has a
    window of its own, unless it is the longest; so have those of one set, whose minute differs if it is static; and,
    unless the earliest events are kept, what is cut to ``max_events``, as it begins later.

    Args:
        samples: before truncation.
        max_events: to which windows are cut; None = they are not.
        keeps_earliest: whether what is cut keeps its earliest events, and so its beginning.
    """
    number, limit = len(samples.patient), np.iinfo(np.int64).max if max_events is None else max_events
    num_events = np.minimum(samples.num_events, limit) if keeps_earliest else samples.num_events
    begins_later = num_events > limit
    alone = np.where(begins_later, 2 + np.arange(number), samples.num_sets == 1)
    order = np.lexsort((samples.num_events, num_events, alone, samples.patient))
    starts = np.union1d(find_runs(samples.patient[order]), find_runs(alone[order]))
    sizes = np.diff(np.append(starts, number))
    longest = np.repeat(num_events[order][starts + sizes - 1], sizes)
    is_prefix = samples.whole_sets[order] | (num_events[order] == longest)
    run = np.repeat(np.arange(len(starts)), sizes)
    own = np.where(is_prefix, 0, 1 + np.arange(number))
    regroup = np.lexsort((own, run))
    order, run, own = order[regroup], run[regroup], own[regroup]
    offsets = np.append(np.union1d(find_runs(run), find_runs(own)), number)
    host, time = order[offsets[1:] - 1], samples.prediction_time
    shared = SharedSamples(
        offsets=offsets,
        num_sets=samples.num_sets[order],
        label=samples.label[order],
        prediction_time=None if time is None else time[order],
    )
    kept = {name: getattr(samples, name)[host] for name in ("patient", "label", *LENGTHS)}
    return replace(samples, **kept, prediction_time=None if time is None else time[host], shared=shared)
