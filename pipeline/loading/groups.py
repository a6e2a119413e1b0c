"""The groups of an epoch: planned from the index alone, then read and made ready for batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.arrays import Ints, is_labelled
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import SampleIndex, Samples, SplitPart, share_windows
from pipeline.dataset.tasks import Task
from pipeline.loading.draws import SampleDraws, check_sampling, data_sets_of
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import BatchPlace, StepCounts
from pipeline.loading.store import PatientStore
from pipeline.sampling.cost import CostModel
from pipeline.sampling.groups import Grouping, group_shards
from pipeline.sampling.plan import EpochPlan, Purpose, plan_epoch, rng_for, split_across_ranks
from pipeline.storage.folder import Folder


class Position(NamedTuple):
    """Which group of an epoch: its number, and the number of the epoch's batches before it, both from 0."""

    epoch: int
    number: int = 0
    first_step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """The global batches of a group of an epoch.  Its samples are numbered over its shards, one after another.

    Attributes:
        shards: the split's shards in which the group's samples lie, ascending.
        samples: all samples [N] of these shards, or the windows that they share, before truncation.
        num_events: [N] int64 of the samples, after truncation.
        num_sets: [N] int64; with truncation an upper bound, because no table says where sets end.
    """

    position: Position
    shards: tuple[int, ...]
    samples: Samples
    num_events: Ints
    num_sets: Ints
    batches: EpochPlan

    @property
    def next_position(self) -> Position:
        epoch, number, first_step = self.position
        return Position(epoch, number + 1, first_step + self.batches.num_batches)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.batches.order.tobytes() + self.batches.batch_offsets.tobytes()).hexdigest()


class GroupPlanner:
    """Plans the groups of a split; a pure function of manifest, tasks or index, and options.

    Attributes:
        entries: the split's shards that have samples.
        num_samples: [n] of each of them; where samples share windows, of these.
        draws: how often epochs use each sample; None = once.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        part: SplitPart,
        tasks: tuple[Task, ...],
        options: LoaderOptions,
    ) -> None:
        check_sampling(options, tasks, int(data_sets_of(manifest.all_shards()).max(initial=0)) + 1)
        share = None
        if options.share_windows and tasks:
            keeps_earliest = options.truncate == "earliest"
            share = partial(share_windows, max_events=options.max_sequence_length, keeps_earliest=keeps_earliest)
        self._index = SampleIndex(folder, manifest, tasks, chosen=part.patients, share=share, verify=options.verify)
        self._options = options
        entries = manifest.splits[part.split]
        counts = self._index.count(entries)
        self.entries, self.num_samples = [entries[number] for number in np.flatnonzero(counts)], counts[counts > 0]
        self.grouping = lru_cache(maxsize=2)(self._group_shards)
        self._samples = lru_cache(maxsize=1)(self._read_samples)
        self.plan_group = lru_cache(maxsize=2)(self._plan_group)
        self.draws = None
        if options.sampling != "natural" or options.data_weights:
            self.draws = SampleDraws(folder, manifest, tasks, options, self.entries, self.num_samples, self._samples)

    def _group_shards(self, epoch: int) -> Grouping:
        return self._cut_groups(self.num_samples if self.draws is None else self.draws.per_shard(epoch), epoch)

    def _cut_groups(self, used: Ints, epoch: int) -> Grouping:
        """Return the groups of an epoch that uses so many samples of each shard."""
        events = np.array([entry.num_events for entry in self.entries], np.int64)
        limit, seed = self._options.group_events, self._options.seed
        return group_shards(used, events, self._options, group_events=limit, seed=seed, epoch=epoch)

    def _read_samples(self, shards: tuple[int, ...]) -> Samples:
        return self._index.read([self.entries[shard] for shard in shards])

    def _plan_group(self, position: Position) -> GroupPlan:
        epoch, number, _ = position
        group = self.grouping(epoch).group(number)
        shards = tuple(group.shards.tolist())
        samples, limit = self._samples(shards), self._options.max_sequence_length or np.iinfo(np.int64).max
        num_events, num_sets = np.minimum(samples.num_events, limit), np.minimum(samples.num_sets, limit)
        used, sample = group.patients, None
        if self.draws is not None:
            used = sample = np.repeat(np.arange(len(num_events)), self.draws.copies(shards, samples, epoch))[used]
        lengths, seed = (num_events[used], num_sets[used]), self._options.seed
        plan = plan_epoch(*lengths, self._options, seed=seed, epoch=epoch, group=number, sample=sample)
        plan = replace(plan, order=used[plan.order])
        after = {"num_events": num_events, "num_sets": num_sets}
        return GroupPlan(position=position, shards=shards, samples=samples, batches=plan, **after)

    def count_batches(self, plan: GroupPlan) -> int:
        """Return the number of batches of an epoch, of which ``plan`` is one group; later groups are planned for it."""
        while plan.next_position.number < self.grouping(plan.position.epoch).num_groups:
            plan = self.plan_group(plan.next_position)
        return plan.next_position.first_step

    def describe_weights(self) -> dict[str, Any]:
        """Return which weights decide draws, as the state of a loader holds them."""
        weights = None if self.draws is None else self.draws.weights
        checksum = None if weights is None else weights.sha256[:12]
        return {"sampling_weights": checksum, "data_weights": list(self._options.data_weights)}

    def max_num_events(self) -> int:
        """Return the maximum number of events of a sample of the split, after truncation."""
        grouping, limit = self._cut_groups(self.num_samples, 0), self._options.max_sequence_length
        groups = (grouping.group(number) for number in range(grouping.num_groups))
        longest = max(int(self._samples(tuple(group.shards.tolist())).num_events.max(initial=0)) for group in groups)
        return longest if limit is None else min(longest, limit)


class LoadedGroup:
    """A group whose patients are in memory: the events of samples to use, and this rank's part of each global batch."""

    def __init__(self, plan: GroupPlan, store: PatientStore, options: LoaderOptions, **ranks: int) -> None:
        epoch, number, first_step = plan.position
        rng = rng_for(Purpose.TRUNCATION, seed=options.seed, epoch=epoch, group=number)
        self.plan, self.store = plan, store
        self.windows = windows = store.select_windows(plan.samples, options, rng)
        cost = CostModel().predict(windows.num_events, windows.num_sets)
        self.batches = split_across_ranks(plan.batches, cost, first_step=first_step, **ranks)
        shared = plan.samples.shared
        labelled = is_labelled(plan.samples.label if shared is None else shared.label)
        if shared is not None:
            labelled = np.add.reduceat(labelled, shared.offsets[:-1], dtype=np.int64) if len(labelled) else labelled
        of_tasks = labelled.T if labelled.ndim > 1 else [labelled]
        amounts = (windows.num_sets, windows.num_events, *of_tasks)
        self._counts = [plan.batches.sum_per_batch(amount) for amount in amounts]

    def place(self, number: int, steps_before_epoch: int) -> BatchPlace:
        epoch, _, first_step = self.plan.position
        cursor, patients = first_step + number, self.plan.batches.patients(number)
        sets, events, *labelled = (int(counts[number]) for counts in self._counts)
        counts = StepCounts(num_patients=len(patients), num_labelled=tuple(labelled), num_sets=sets, num_events=events)
        whole, step = partial(self.store.gather_global_batch, self.windows, patients), steps_before_epoch + cursor
        return BatchPlace(epoch=epoch, cursor=cursor, step=step, counts=counts, global_batch=whole)
