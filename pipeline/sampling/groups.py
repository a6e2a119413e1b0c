"""Groups: how an epoch walks a split that does not fit in memory, some shards at a time.

An epoch puts the shards in a random order and cuts that sequence; the patients of a group are planned
(``pipeline.sampling.plan``) when its turn is near.  A shard is a hash partition of all patients, so a few of them are a
fair sample of all lengths, and a batch made of the patients of one group is as homogeneous, and as mixed, as one made
of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.arrays import Ints, concatenate_ranges, offsets_from_sizes
from pipeline.sampling.plan import Purpose, rng_for
from pipeline.sampling.policy import Policy

GROUP_EVENTS = 1 << 23
"""Approximate number of events of a group: some 100 MB in memory, and with several groups twice that, because the next
one is read while one is used.  Reading takes a third of a second, which is what it costs to resume."""


class Group(NamedTuple):
    """A subset of a split that fits in memory and is planned as a whole.

    Attributes:
        shards: [n] int64, the shards in which its patients lie, in the manifest's order.
        patients: [P] int64, its patients, as rows of these shards one after another.  They are all rows, except in
            a shard at either end of the group, which a neighbour may share.
    """

    shards: Ints
    patients: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """The groups of one epoch.

    Attributes:
        num_patients: [N] of each shard, in the manifest's order.
        shard_order: [N] the shards in this epoch's order.
        borders: [G+1] group ``number`` has the patients ``borders[number]:borders[number+1]`` in that order.
    """

    num_patients: Ints
    shard_order: Ints
    borders: Ints

    @property
    def num_groups(self) -> int:
        return len(self.borders) - 1

    def group(self, number: int) -> Group:
        """Return group ``number``, counted from 0."""
        before = offsets_from_sizes(self.num_patients[self.shard_order])
        start, stop = self.borders[number : number + 2]
        parts = np.arange(np.searchsorted(before, start, side="right") - 1, np.searchsorted(before, stop, side="left"))
        parts = parts[np.argsort(self.shard_order[parts])]
        shards = self.shard_order[parts]
        first = np.maximum(start - before[parts], 0)
        sizes = np.minimum(stop - before[parts], self.num_patients[shards]) - first
        first += offsets_from_sizes(self.num_patients[shards])[:-1]
        return Group(shards, concatenate_ranges(first, sizes))


def group_shards(
    num_patients: Ints, num_events: Ints, policy: Policy, *, group_events: int, seed: int, epoch: int
) -> Grouping:
    """Cut an epoch's shards into as few groups as ``group_events`` allows, of about equal numbers of events.

    A group has at most ``group_events`` and a shard.  If batches have a fixed size, every border but the last is
    a multiple of it: patients who would not fill a group's last batch belong to the next group.  They are the longest
    of one shard, a few in thousands.  Without ``policy.shuffle`` shards stay in the manifest's order.

    Args:
        num_patients: [N] of each shard, counted as often as the epoch uses them.
        num_events: [N] of each shard.
    """
    order = np.arange(len(num_patients))
    if policy.shuffle:
        order = rng_for(Purpose.SHARD_ORDER, seed=seed, epoch=epoch).permutation(order)
    events_before, patients_before = offsets_from_sizes(num_events[order]), offsets_from_sizes(num_patients[order])
    total = int(events_before[-1])
    num_groups = max(1, -(-total // group_events))
    targets = total * np.arange(1, num_groups) // num_groups
    inner = patients_before[np.searchsorted(events_before, targets, side="right") - 1]
    inner = np.unique(inner - inner % (policy.fixed_size or 1))
    inner = inner[(inner > 0) & (inner < patients_before[-1])]
    borders = np.concatenate([[0], inner, patients_before[-1:]])
    return Grouping(num_patients=num_patients, shard_order=order, borders=borders)
