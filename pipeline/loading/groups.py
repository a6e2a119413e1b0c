"""The groups of an epoch: planned from the index alone, then read and made ready for batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from pipeline.arrays import Ints
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import LengthIndex, Lengths
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import BatchPlace, StepCounts
from pipeline.loading.store import PatientStore
from pipeline.sampling.cost import CostModel
from pipeline.sampling.groups import Grouping, group_shards
from pipeline.sampling.plan import EpochPlan, Purpose, plan_epoch, rng_for, split_across_ranks
from pipeline.schema import UNLABELLED, UserError
from pipeline.storage.folder import Folder


class Position(NamedTuple):
    """Which group of an epoch: its number, and the number of the epoch's batches before it, both from 0."""

    epoch: int
    number: int = 0
    first_step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """The global batches of a group of an epoch.  Its patients are numbered over its shards, one after another.

    Attributes:
        shards: the split's shards in which the group's patients lie, ascending.
        num_events: [P] int64 of all patients of these shards, after truncation.
        num_sets: [P] int64; with truncation an upper bound, because the index does not say where sets end.
    """

    position: Position
    shards: tuple[int, ...]
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
    """Plans the groups of a split; a pure function of manifest, index and options."""

    def __init__(self, folder: Folder, manifest: Manifest, split: str, options: LoaderOptions) -> None:
        self.entries, self._options = manifest.splits[split], options
        self._index = LengthIndex(folder, manifest, verify=options.verify)
        self.grouping = lru_cache(maxsize=2)(self._group_shards)
        self._lengths = lru_cache(maxsize=1)(self._read_lengths)
        self.plan_group = lru_cache(maxsize=2)(self._plan_group)

    def _group_shards(self, epoch: int) -> Grouping:
        patients = np.array([entry.num_patients for entry in self.entries], np.int64)
        events = np.array([entry.num_events for entry in self.entries], np.int64)
        limit, seed = self._options.group_events, self._options.seed
        return group_shards(patients, events, self._options, group_events=limit, seed=seed, epoch=epoch)

    def _read_lengths(self, shards: tuple[int, ...]) -> Lengths:
        num_events, num_sets = self._index.read([self.entries[shard] for shard in shards])
        limit = self._options.max_sequence_length
        return (num_events, num_sets) if limit is None else (num_events.clip(max=limit), num_sets.clip(max=limit))

    def _plan_group(self, position: Position) -> GroupPlan:
        epoch, number, _ = position
        group = self.grouping(epoch).group(number)
        shards = tuple(group.shards.tolist())
        num_events, num_sets = self._lengths(shards)
        lengths = num_events[group.patients], num_sets[group.patients]
        plan = plan_epoch(*lengths, self._options, seed=self._options.seed, epoch=epoch, group=number)
        plan = replace(plan, order=group.patients[plan.order])
        return GroupPlan(position=position, shards=shards, num_events=num_events, num_sets=num_sets, batches=plan)

    def count_batches(self, plan: GroupPlan) -> int:
        """Return the number of batches of an epoch, of which ``plan`` is one group; later groups are planned for it."""
        while plan.next_position.number < self.grouping(plan.position.epoch).num_groups:
            plan = self.plan_group(plan.next_position)
        return plan.next_position.first_step

    def max_num_events(self) -> int:
        """Return the maximum number of events of a patient of the split, after truncation."""
        grouping = self.grouping(0)
        groups = (grouping.group(number) for number in range(grouping.num_groups))
        return max(int(self._lengths(tuple(group.shards.tolist()))[0].max(initial=0)) for group in groups)


class LoadedGroup:
    """A group whose patients are in memory: their events to use, and this rank's part of each global batch."""

    def __init__(self, plan: GroupPlan, store: PatientStore, options: LoaderOptions, **ranks: int) -> None:
        epoch, number, first_step = plan.position
        rng = rng_for(Purpose.TRUNCATION, seed=options.seed, epoch=epoch, group=number)
        self.plan, self.store = plan, store
        self.windows = windows = store.select_windows(options, rng)
        if not np.array_equal(windows.num_events, plan.num_events) or (windows.num_sets > plan.num_sets).any():
            raise UserError("index.parquet: contradicts the shards; run preprocess.py again")
        cost = CostModel().predict(windows.num_events, windows.num_sets)
        self.batches = split_across_ranks(plan.batches, cost, first_step=first_step, **ranks)
        amounts = (store.label != UNLABELLED, windows.num_sets, windows.num_events)
        self._counts = [plan.batches.sum_per_batch(amount) for amount in amounts]

    def place(self, number: int, steps_before_epoch: int) -> BatchPlace:
        epoch, _, first_step = self.plan.position
        cursor, patients = first_step + number, self.plan.batches.patients(number)
        labelled, sets, events = (int(counts[number]) for counts in self._counts)
        counts = StepCounts(num_patients=len(patients), num_labelled=labelled, num_sets=sets, num_events=events)
        whole, step = partial(self.store.gather_global_batch, self.windows, patients), steps_before_epoch + cursor
        return BatchPlace(epoch=epoch, cursor=cursor, step=step, counts=counts, global_batch=whole)
