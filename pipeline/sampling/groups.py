"""Groups: how an epoch walks a split that does not fit in memory, some shards at a time.

A pure function of (what the manifest counts, seed, epoch): NumPy only, no input or output.  An epoch puts the shards in
a row, at random, and cuts the row; the patients of a group are planned (``pipeline.sampling.plan``) when its turn is
near.  A
shard is a hash partition of all patients, so a few of them are a fair sample of all lengths, and where a batch is made
of the patients of one group it is as alike, and as mixed, as one made of all.  A split of one group is planned whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.arrays import offsets_of, ranges
from pipeline.sampling.plan import source_of_chance

GROUP_EVENTS = 1 << 23
"""About how many events a group has.  An event takes 9 bytes in memory and a set 12, some 100 MB in all, and with
several groups twice that, because the next one is read while one is used.  Reading takes some 35 ns an event: a third
of a second, which is what it costs to resume."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Some of a split's patients.

    Attributes:
        shards: [n] int64, the shards that they lie in, in the manifest's order.
        patients: [P] int64, which of the patients of those shards they are, counted over them one after another.
            All, but for a shard at either end of the group, which a neighbour may share.
    """

    shards: npt.NDArray[np.int64]
    patients: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """The groups of one epoch.

    Attributes:
        num_patients: [N] of each shard, in the manifest's order.
        row: [N] int64, the shards in this epoch's order.
        borders: [G+1] int64, group ``number`` has the patients ``borders[number]:borders[number+1]`` of that row.
    """

    num_patients: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    borders: npt.NDArray[np.int64]

    @property
    def num_groups(self) -> int:
        return len(self.borders) - 1

    def group(self, number: int) -> Group:
        """Group ``number``, from 0 on."""
        before = offsets_of(self.num_patients[self.row])
        start, stop = self.borders[number : number + 2]
        parts = np.arange(np.searchsorted(before, start, side="right") - 1, np.searchsorted(before, stop, side="left"))
        parts = parts[np.argsort(self.row[parts])]
        shards = self.row[parts]
        first = np.maximum(start - before[parts], 0)
        sizes = np.minimum(stop - before[parts], self.num_patients[shards]) - first
        return Group(shards=shards, patients=ranges(offsets_of(self.num_patients[shards])[:-1] + first, sizes))


def group_shards(
    num_patients: npt.NDArray[np.int64],
    num_events: npt.NDArray[np.int64],
    *,
    group_events: int,
    multiple: int,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> Grouping:
    """Cut an epoch's shards into as few groups as ``group_events`` allows, of about equal numbers of events.

    A group has at most ``group_events`` and a shard.  Every border but the last is a multiple of ``multiple``, the
    patients of a batch: where a group's patients do not fill its last batch, those left over belong to the next group.
    They are the longest of one shard, a few in thousands.

    Args:
        num_patients: [N] of each shard, at least 1.
        num_events: [N] of each shard.
        group_events: 1 or more.
        multiple: 1 or more.
        shuffle: shards in an order of their own every epoch; otherwise the manifest's.
        seed: 0 or more.
        epoch: 0, 1, 2 …
    """
    count = len(num_patients)
    row = source_of_chance(2, seed=seed, epoch=epoch).permutation(count) if shuffle else np.arange(count)
    events_before, patients_before = offsets_of(num_events[row]), offsets_of(num_patients[row])
    total = int(events_before[-1])
    num_groups = max(1, -(-total // group_events))
    shares = total * np.arange(1, num_groups) // num_groups
    inner = patients_before[np.searchsorted(events_before, shares, side="right") - 1]
    inner = np.unique(inner - inner % multiple)
    ends = np.array([0, patients_before[-1]])
    return Grouping(num_patients=num_patients, row=row, borders=np.concatenate([ends[:1], inner[inner > 0], ends[1:]]))
