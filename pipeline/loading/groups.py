"""The groups of an epoch: planned from the index alone, then read and made ready for batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import LengthIndex, Lengths
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import StepCounts
from pipeline.loading.store import PatientStore
from pipeline.sampling.cost import CostModel
from pipeline.sampling.groups import Grouping, group_shards
from pipeline.sampling.plan import EpochPlan, Purpose, plan_epoch, rng_for, split_across_ranks
from pipeline.schema import UNLABELLED, UserError
from pipeline.storage.folder import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """The plan of a group of an epoch.  Its patients are numbered over its shards, one after another.

    Attributes:
        epoch: the epoch.
        number: of the group in the epoch, from 0.
        first_step: number of the epoch's batches before this group.
        shards: the split's shards in which the group's patients lie, ascending.
        num_events: [P] int64 of all patients of these shards, after truncation.
        num_sets: [P] int64; with truncation an upper bound, because the index does not say where sets end.
        batches: the group's global batches.
    """

    epoch: int
    number: int
    first_step: int
    shards: tuple[int, ...]
    num_events: npt.NDArray[np.int64]
    num_sets: npt.NDArray[np.int64]
    batches: EpochPlan

    @property
    def position(self) -> tuple[int, int, int]:
        return self.epoch, self.number, self.first_step

    @property
    def stop_step(self) -> int:
        """Number of the epoch's batches up to the end of this group."""
        return self.first_step + self.batches.num_batches

    def fingerprint(self) -> str:
        """Return the SHA-256 of the batches."""
        return hashlib.sha256(self.batches.order.tobytes() + self.batches.batch_offsets.tobytes()).hexdigest()


class GroupPlanner:
    """Plans the groups of a split; a pure function of manifest, index and options."""

    def __init__(self, folder: Folder, manifest: Manifest, split: str, options: LoaderOptions) -> None:
        self.entries, self._options = manifest.splits[split], options
        self._index = LengthIndex(folder, manifest, verify=options.verify)
        self.grouping = lru_cache(maxsize=2)(self._group_shards)
        self._lengths = lru_cache(maxsize=1)(self._read_lengths)

    def _group_shards(self, epoch: int) -> Grouping:
        return group_shards(
            np.array([entry.num_patients for entry in self.entries], np.int64),
            np.array([entry.num_events for entry in self.entries], np.int64),
            group_events=self._options.group_events,
            multiple=self._options.fixed_size or 1,
            shuffle=self._options.shuffle,
            seed=self._options.seed,
            epoch=epoch,
        )

    def _read_lengths(self, shards: tuple[int, ...]) -> Lengths:
        num_events, num_sets = self._index.read([self.entries[shard] for shard in shards])
        limit = self._options.max_sequence_length
        return (num_events, num_sets) if limit is None else (num_events.clip(max=limit), num_sets.clip(max=limit))

    def plan_group(self, epoch: int, number: int, first_step: int) -> GroupPlan:
        """Return the plan of group ``number`` of an epoch, which begins at ``first_step``."""
        group = self.grouping(epoch).group(number)
        shards = tuple(group.shards.tolist())
        num_events, num_sets = self._lengths(shards)
        lengths = num_events[group.patients], num_sets[group.patients]
        plan = plan_epoch(*lengths, self._options, seed=self._options.seed, epoch=epoch, group=number)
        return GroupPlan(
            epoch=epoch,
            number=number,
            first_step=first_step,
            shards=shards,
            num_events=num_events,
            num_sets=num_sets,
            batches=EpochPlan(order=group.patients[plan.order], batch_offsets=plan.batch_offsets),
        )

    def count_batches(self, plan: GroupPlan) -> int:
        """Return the number of batches of an epoch, of which ``plan`` is one group; later groups are planned for it."""
        for number in range(plan.number + 1, self.grouping(plan.epoch).num_groups):
            plan = self.plan_group(plan.epoch, number, plan.stop_step)
        return plan.stop_step

    def max_num_events(self) -> int:
        """Return the maximum number of events of a patient of the split, after truncation."""
        grouping = self.grouping(0)
        groups = (grouping.group(number) for number in range(grouping.num_groups))
        return max(int(self._lengths(tuple(group.shards.tolist()))[0].max(initial=0)) for group in groups)


class LoadedGroup:
    """A group whose patients are in memory.

    Attributes:
        plan: of the group.
        store: the patients of its shards.
        windows: the events to use of each patient.
        batches: this rank's part of each global batch.
    """

    def __init__(
        self, plan: GroupPlan, store: PatientStore, options: LoaderOptions, *, rank: int, world_size: int
    ) -> None:
        rng = rng_for(Purpose.TRUNCATION, seed=options.seed, epoch=plan.epoch, group=plan.number)
        self.plan, self.store = plan, store
        self.windows = windows = store.select_windows(options.max_sequence_length, options.truncate, rng)
        if not np.array_equal(windows.num_events, plan.num_events) or (windows.num_sets > plan.num_sets).any():
            raise UserError("index.parquet: contradicts the shards; run preprocess.py again")
        self.batches = split_across_ranks(
            plan.batches,
            (options.cost or CostModel()).predict(windows.num_events, windows.num_sets),
            rank=rank,
            world_size=world_size,
            first_step=plan.first_step,
        )
        amounts = (store.label != UNLABELLED, windows.num_sets, windows.num_events)
        self._counts = [plan.batches.sum_per_batch(amount) for amount in amounts]

    def counts(self, number: int) -> StepCounts:
        """Return the exact counts of the group's global batch ``number``."""
        labelled, sets, events = (int(counts[number]) for counts in self._counts)
        patients = int(self.plan.batches.batch_sizes[number])
        return StepCounts(num_patients=patients, num_labelled=labelled, num_sets=sets, num_events=events)
