"""Copies of a sample in different batches: in one batch they would have the same noise, and count as one twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Ints

REACH = 8
"""How many batches away a copy may go; a batch so near has patients of similar length."""

MAX_DIFFERENCE = 0.2
"""How far in length two patients who change places may differ: the few longest have no others of their length, and
copies of them that moved would pad whole batches to their length."""

Limits = Sequence[tuple[npt.NDArray[Any], float]]
"""What each patient uses [P] of something, and how much of it a batch may hold."""


def separate_copies(order: Ints, batch_offsets: Ints, sample: Ints, num_events: Ints, limits: Limits) -> Ints:
    """Return an ``order`` [P] in which as few batches as possible hold a sample twice.

    Copies change places with patients of similar length of near batches, so that sizes stay and ``limits`` hold.  Where
    a sample has more copies than there are batches, or its neighbours are of the same few samples, some stay.

    Args:
        order: [P] int64, which patient stands where.
        batch_offsets: [N+1] int64, batch ``b`` is ``order[batch_offsets[b]:batch_offsets[b+1]]``.
        sample: [P] int64 of each patient, equal for copies of one sample.
        num_events: [P] int64 of each patient.
        limits: what batches keep to.
    """
    swaps = _Swaps(order.copy(), batch_offsets, sample, num_events, limits)
    batch = swaps.batch
    by_sample = np.lexsort((sample[order], batch))
    is_again = (np.diff(batch[by_sample]) == 0) & (np.diff(sample[order][by_sample]) == 0)
    for place in np.sort(by_sample[1:][is_again]).tolist():
        swaps.move(place, int(batch[place]))
    return swaps.order


class _Swaps:
    """Batches between which patients change places."""

    def __init__(self, order: Ints, batch_offsets: Ints, sample: Ints, num_events: Ints, limits: Limits) -> None:
        self.order, self._offsets = order, batch_offsets.tolist()
        self._sample, self._num_events = sample, num_events
        self.batch = np.repeat(np.arange(len(batch_offsets) - 1), np.diff(batch_offsets))
        self._limits = [
            (amount, limit, np.add.reduceat(amount[order], batch_offsets[:-1]).tolist()) for amount, limit in limits
        ]
        self._members: dict[int, Counter[int]] = {}

    def _samples_of(self, batch: int) -> Counter[int]:
        if batch not in self._members:
            inside = self.order[self._offsets[batch] : self._offsets[batch + 1]]
            self._members[batch] = Counter(self._sample[inside].tolist())
        return self._members[batch]

    def move(self, place: int, home: int) -> None:
        """Let the copy at ``place``, in batch ``home``, change places with the most similar patient who can."""
        own = self._samples_of(home)
        copy = int(self._sample[self.order[place]])
        if own[copy] < 2:
            return
        first, last = max(home - REACH, 0), min(home + REACH + 1, len(self._offsets) - 1)
        near = self.order[self._offsets[first] : self._offsets[last]]
        own_length = self._num_events[self.order[place]]
        difference = abs(self._num_events[near] - own_length)
        alike = np.argsort(difference, kind="stable")[: np.count_nonzero(difference <= 1 + MAX_DIFFERENCE * own_length)]
        for partner in (self._offsets[first] + alike).tolist():
            other, guest = int(self.batch[partner]), int(self._sample[self.order[partner]])
            there = self._samples_of(other)
            if not there[copy] and not own[guest] and self._exchange(place, home, partner, other):
                own.update((guest,))
                own.subtract((copy,))
                there.update((copy,))
                there.subtract((guest,))
                return

    def _exchange(self, place: int, home: int, partner: int, other: int) -> bool:
        """Exchange two patients and return True, unless a batch would then pass a limit that it keeps now."""
        leaves, comes = self.order[place], self.order[partner]
        changes = [amount[comes] - amount[leaves] for amount, _, _ in self._limits]
        for change, (_, limit, used) in zip(changes, self._limits, strict=True):
            if (change > 0 and used[home] + change > limit) or (change < 0 and used[other] - change > limit):
                return False
        for change, (_, _, used) in zip(changes, self._limits, strict=True):
            used[home] += change
            used[other] -= change
        self.order[place], self.order[partner] = comes, leaves
        return True
