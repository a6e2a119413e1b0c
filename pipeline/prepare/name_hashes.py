"""Hashes that stand for names where these are compared: 16 bytes each, however long the names are."""

from __future__ import annotations

import secrets
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.arrays import Ints

Hashes: TypeAlias = npt.NDArray[np.uint64]

SEEDS: Final = (secrets.randbits(64), secrets.randbits(64))
"""Of two hashes of a name, which are its 128 bits here; nobody can choose names whose bits are those of others."""


def hash_names(names: pl.Series) -> tuple[Hashes, Hashes]:
    """Return two hashes [n] of each name, a string; those of equal names are equal in this process."""
    first, second = (names.hash(seed).to_numpy() for seed in SEEDS)
    return first, second


def hash_similar(names: pl.Series) -> Hashes:
    """Return a hash [n] of each name that those share which differ in zeros before them or in case alone."""
    return names.str.to_lowercase().str.strip_chars_start("0").hash(SEEDS[0]).to_numpy()


def look_up(first: Hashes, second: Hashes, wanted_first: Hashes, wanted_second: Hashes) -> Ints:
    """Return the position of each wanted pair of hashes [n] among others, sorted by the first; -1 = it is not there."""
    place, left = np.searchsorted(first, wanted_first), np.arange(len(wanted_first))
    found = np.full(len(wanted_first), -1)
    while len(left):  # again where names of the same first hash stand before it
        left = left[place[left] < len(first)]
        left = left[first[place[left]] == wanted_first[left]]
        is_found = second[place[left]] == wanted_second[left]
        found[left[is_found]] = place[left[is_found]]
        left = left[~is_found]
        place[left] += 1
    return found
