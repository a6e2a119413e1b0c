"""Lengths and medians of numbers that come in parts: memory does not follow how many numbers there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Floats, Ints

MAX_HELD: Final = 1 << 17
"""Maximum number of numbers that are held to find their median; of more, they are read several times."""

DIGIT_BITS: Final = 16


class Lengths:
    """How often each of some whole numbers occurs."""

    def __init__(self, *parts: Any) -> None:
        """Count the numbers of arrays, of NumPy or Arrow."""
        self._counts: Counter[int] = Counter()
        for part in parts:
            self.add(part)

    def add(self, numbers: Any) -> None:
        counted = pc.value_counts(numbers if isinstance(numbers, pa.ChunkedArray) else pa.array(numbers))
        values, counts = (counted.field(name).to_pylist() for name in ("values", "counts"))
        self._counts.update(dict(zip(values, counts, strict=True)))

    def __len__(self) -> int:
        return self._counts.total()

    @property
    def distinct(self) -> tuple[Ints, Ints]:
        """Return [n] the numbers that occur, increasing, and [n] how often."""
        numbers = np.array(sorted(self._counts.items()), np.int64).reshape(-1, 2)
        return numbers[:, 0], numbers[:, 1]

    @property
    def median(self) -> float:
        values, counts = self.distinct
        ends = counts.cumsum()
        return float(values[np.searchsorted(ends, _middle(len(self)), side="right")].mean())


def find_medians(read: Callable[[], Iterable[tuple[str, Floats]]]) -> dict[str, float]:
    """Return the median of the numbers of each name; ``read`` yields a name and some of its numbers at a time."""
    sizes: Counter[str] = Counter()
    held: dict[str, list[Floats]] = {}
    for name, numbers in read():
        sizes[name] += len(numbers)
        held[name] = [*held.get(name, []), numbers] if sizes[name] <= MAX_HELD else []
    ranks = {name: [_Rank(rank) for rank in _middle(size)] for name, size in sizes.items() if size > MAX_HELD}
    while any(rank.bits for found in ranks.values() for rank in found):
        for name, numbers in read():
            for rank in ranks.get(name, []):
                rank.count(numbers)
        for found in ranks.values():
            for rank in found:
                rank.narrow()
    whole = {name: np.concatenate(parts) for name, parts in held.items() if 0 < sizes[name] <= MAX_HELD}
    medians = {name: float(np.median(numbers)) for name, numbers in whole.items()}
    return medians | {name: float(np.mean([rank.number for rank in found])) for name, found in ranks.items()}


def _middle(size: int) -> list[int]:
    """Return the positions in order of the two numbers of which the median is the mean."""
    return [(size - 1) // 2, size // 2]


class _Rank:
    """Finds the number of a rank, from 0, by its digits: one each time that all numbers are counted."""

    def __init__(self, rank: int) -> None:
        self._rank, self._prefix = rank, 0
        self.bits = 64  # that are not known
        self._counts = np.zeros(1 << DIGIT_BITS, np.int64)

    def count(self, numbers: Floats) -> None:
        """Count the next digits of the numbers that begin as the number in question."""
        bits = numbers.view(np.int64)
        key = (bits ^ ((bits >> 63) | np.int64(-1 << 63))).view(np.uint64)  # in the order of numbers
        if self.bits < 64:
            key = key[key >> np.uint64(self.bits) == self._prefix]
        digit = key >> np.uint64(self.bits - DIGIT_BITS) & np.uint64((1 << DIGIT_BITS) - 1)
        self._counts += np.bincount(digit.astype(np.int64), minlength=1 << DIGIT_BITS)

    def narrow(self) -> None:
        """Take the digit of the rank."""
        ends = self._counts.cumsum()
        digit = int(np.searchsorted(ends, self._rank, side="right"))
        self._rank -= int(ends[digit] - self._counts[digit])
        self._prefix, self.bits = self._prefix << DIGIT_BITS | digit, self.bits - DIGIT_BITS
        self._counts[:] = 0

    @property
    def number(self) -> float:
        high = 1 << 63
        bits = self._prefix ^ high if self._prefix & high else self._prefix ^ ((1 << 64) - 1)
        return float(np.uint64(bits).view(np.float64))
