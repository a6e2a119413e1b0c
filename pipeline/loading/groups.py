"""The groups of an epoch: planned from the index alone, then read as their batches need them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.arrays import Ints, is_labelled, offsets_from_sizes
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.patients import SplitPart
from pipeline.dataset.samples import SampleIndex, Samples, share_windows
from pipeline.dataset.tasks import Task
from pipeline.loading.batch import PatientBatch
from pipeline.loading.draws import SampleDraws, check_sampling, data_sets_of
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import BatchPlace, StepCounts
from pipeline.loading.store import PatientStore, Windows
from pipeline.sampling.cost import CostModel
from pipeline.sampling.groups import Grouping, group_shards
from pipeline.sampling.plan import EpochPlan, Purpose, plan_epoch, rng_for, split_across_ranks
from pipeline.storage.folder import Folder

# Batches are gathered together up to about this many events: 2 MB, enough to hide the cost of a call.
GATHER_EVENTS = 1 << 17


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
    """A group whose patients come into memory shard by shard, in the order in which its batches need them.

    Several threads may ask for batches: a shard is read by one of them, in the same order whoever it is.
    """

    def __init__(
        self, plan: GroupPlan, store: PatientStore, options: LoaderOptions, *, first: int = 0, **ranks: int
    ) -> None:
        """Make ready to read what ``store`` lacks of the shards of ``plan``; batch ``first`` is needed first."""
        epoch, number, _ = plan.position
        rng = rng_for(Purpose.TRUNCATION, seed=options.seed, epoch=epoch, group=number)
        self.plan, self.store, self._options, self._ranks = plan, store, options, ranks
        self.windows = Windows.of(plan.samples, options, rng)
        self._changed, self._is_reading = threading.Condition(), False
        self._error: BaseException | None = None
        unread = list(store.unread)  # as it is now: an iteration that is about to end may still read
        self._order, self._needed = _order_shards(plan, store, unread, first)
        self._num_read = len(self._order) - len(unread)
        for shard in self._order[: self._num_read]:
            store.locate(self.windows, shard)
        shared = plan.samples.shared
        labelled = is_labelled(plan.samples.label if shared is None else shared.label)
        if shared is not None:
            labelled = np.add.reduceat(labelled, shared.offsets[:-1], dtype=np.int64) if len(labelled) else labelled
        of_tasks = labelled.T if labelled.ndim > 1 else [labelled]
        self._num_events, *self._labelled = (
            plan.batches.sum_per_batch(amount) for amount in (self.windows.num_events, *of_tasks)
        )

    @property
    def unread(self) -> list[int]:
        """Return the numbers of the shards that are still to be read, in order."""
        return self._order[self._num_read :]

    def read(self, folder: Folder, batch: int | None = None) -> None:
        """Read the shards that a batch needs, and those before them in the order; None = all."""
        needed = len(self._order) if batch is None else self._needed[batch]
        while self._begin_shard(needed):
            shard, error = self._order[self._num_read], None
            try:
                self.store.read(shard, folder, verify=self._options.verify)
                self.store.locate(self.windows, shard)
            except BaseException as failure:
                error = failure
                raise
            finally:
                self._end_shard(error)

    def _begin_shard(self, needed: int) -> bool:
        """Wait until so many shards are there or nobody reads; return whether the caller is to read the next one."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_read >= needed or not self._is_reading)
            if self._num_read >= needed:
                return False
            if self._error is not None:  # another thread was told, who may need the shard later
                raise self._error
            self._is_reading = True
            return True

    def _end_shard(self, error: BaseException | None) -> None:
        with self._changed:
            self._num_read += error is None
            self._error, self._is_reading = error, False
            self._changed.notify_all()

    def gather(self, folder: Folder, number: int = 0) -> Iterator[PatientBatch]:
        """Yield this rank's part of each batch from batch ``number`` on; shards are read as they are needed."""
        num_batches, limit = self.plan.batches.num_batches, GATHER_EVENTS * self._ranks["world_size"]
        events_before = offsets_from_sizes(self._num_events)
        while number < num_batches:
            self.read(folder, number)
            # As many batches as GATHER_EVENTS and the shards that there are allow, but at least one.
            stop = int(np.searchsorted(events_before, events_before[number] + limit, side="right")) - 1
            stop = max(stop, number + 1)
            stop = number + int(np.append(self._needed[number:stop] > self._num_read, True).argmax())
            part = self.split_batches(number, stop)
            yield from self.store.gather_batches(self.windows, part.order, part.batch_offsets)
            number = stop

    def split_batches(self, start: int, stop: int) -> EpochPlan:
        """Return this rank's part of the batches ``start`` … ``stop`` − 1, whose shards have been read."""
        whole, windows = self.plan.batches, self.windows
        offsets = whole.batch_offsets[start : stop + 1]
        order = whole.order[offsets[0] : offsets[-1]]
        part = EpochPlan(order=np.arange(len(order)), batch_offsets=offsets - offsets[0])
        if self._ranks["world_size"] == 1:
            return replace(part, order=order)
        cost = CostModel().predict(windows.num_events[order], windows.num_sets[order])
        own = split_across_ranks(part, cost, first_step=self.plan.position.first_step + start, **self._ranks)
        return replace(own, order=order[own.order])

    def place(self, number: int, steps_before_epoch: int) -> BatchPlace:
        epoch, _, first_step = self.plan.position
        cursor, patients = first_step + number, self.plan.batches.patients(number)
        sets, events = int(self.windows.num_sets[patients].sum()), int(self._num_events[number])
        labelled = tuple(int(counts[number]) for counts in self._labelled)
        counts = StepCounts(num_patients=len(patients), num_labelled=labelled, num_sets=sets, num_events=events)
        whole, step = partial(self.store.gather_global_batch, self.windows, patients), steps_before_epoch + cursor
        return BatchPlace(epoch=epoch, cursor=cursor, step=step, counts=counts, global_batch=whole)


def _order_shards(plan: GroupPlan, store: PatientStore, unread: list[int], first: int) -> tuple[list[int], Ints]:
    """Return in which order shards are needed from batch ``first`` on, and how many of them each of N batches needs.

    Those that have been read come first, those that no batch needs last.  The numbers [N] int64 say that a batch needs
    some of the first so many.
    """
    batches, num_shards = plan.batches, store.num_shards
    shard_of, begin = store.shard_of(plan.samples.patient[batches.order]), batches.batch_offsets[first]
    shards, position = np.unique(shard_of[begin:], return_index=True)
    first_use = np.full(num_shards, len(shard_of))
    first_use[shards] = position
    is_unread = np.isin(np.arange(num_shards), unread)
    order = np.lexsort((first_use, is_unread))
    rank = np.empty(num_shards, np.int64)
    rank[order] = np.arange(1, num_shards + 1)
    needed = np.maximum.reduceat(rank[shard_of], batches.batch_offsets[:-1]) if len(shard_of) else np.zeros(0, np.int64)
    return order.tolist(), needed
