"""Number the distinct names of a table that comes in parts, of which any may bring names anew."""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pipeline.arrays import Ints

Hashes: TypeAlias = npt.NDArray[np.uint64]

SEEDS: Final = (secrets.randbits(64), secrets.randbits(64))
"""Of two hashes of a name, which are its 128 bits here; nobody can choose names whose bits are those of others."""


class _Run(NamedTuple):
    """Some names, sorted by their first hash: both hashes and the number of each."""

    first: Hashes
    second: Hashes
    number: Ints

    @classmethod
    def sort(cls, first: Hashes, second: Hashes, number: Ints) -> _Run:
        order = np.argsort(first)
        return cls(first[order], second[order], number[order])


class NameNumbers:
    """Numbers names from 0, in the order in which they first come.

    A part is looked up in sorted runs, of which there are as many as the number of names has bits, so its cost follows
    its own size.  24 bytes a name are kept besides the names.
    """

    def __init__(self) -> None:
        self._names = [pa.array([], pa.large_string())]
        self._runs: list[_Run] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def names(self) -> pa.Array:
        """All names, in the order of their numbers."""
        return pa.concat_arrays(self._names)

    def number(self, names: pa.Array) -> Ints:
        """Return the number [n] of each of some names, large strings that are distinct; new ones get the next."""
        first, second = hash_names(names)
        order = np.argsort(first)  # neighbours are looked up one after the other
        numbers = np.full(len(names), -1)
        for run in self._runs:
            numbers[order] = np.maximum(numbers[order], _look_up(run, first[order], second[order]))
        new = np.flatnonzero(numbers < 0)
        if len(new):
            numbers[new] = np.arange(self._size, self._size + len(new))
            self._names.append(names.take(pa.array(new)))
            self._size += len(new)
            self._add(_Run.sort(first[new], second[new], numbers[new]))
        return numbers

    def _add(self, run: _Run) -> None:
        """Keep a run; of runs of similar length one is made, so each name is sorted a few times in all."""
        while self._runs and len(self._runs[-1].first) <= 2 * len(run.first):
            first, second, number = (np.concatenate(pair) for pair in zip(self._runs.pop(), run, strict=True))
            run = _Run.sort(first, second, number)
        self._runs.append(run)


def hash_names(names: pa.Array) -> tuple[Hashes, Hashes]:
    """Return two hashes [n] of each name."""
    series = pl.Series("name", pl.from_arrow(names))
    first, second = (series.hash(seed).to_numpy() for seed in SEEDS)
    return first, second


def _look_up(run: _Run, first: Hashes, second: Hashes) -> Ints:
    """Return the number of each name [n] in a run; -1 = it is not there."""
    numbers, place, left = np.full(len(first), -1), np.searchsorted(run.first, first), np.arange(len(first))
    while len(left):  # again where names of the same first hash stand before it
        left = left[place[left] < len(run.first)]
        left = left[run.first[place[left]] == first[left]]
        is_found = run.second[place[left]] == second[left]
        numbers[left[is_found]] = run.number[place[left[is_found]]]
        left = left[~is_found]
        place[left] += 1
    return numbers
