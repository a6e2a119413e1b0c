"""Draws: how often an epoch uses each sample, where it does not use each once.

Samples have weights and belong to *strata*, such as the samples of one class.  An epoch draws a fixed number from each
stratum, its *quota*, in proportion to the weights, and with as few repetitions as that allows: a sample of which 2.3
copies are due gets 2 or 3.  For that the samples of a stratum lie on a line, each as long as the copies that are due to
it, and a sample is drawn once for every whole number, moved by a *phase*, that falls into its part (systematic
sampling, Madow 1949).  Each epoch moves the phase by the golden ratio, so that a sample which was rounded down is
rounded up soon, and after any number of epochs samples of equal weight were used almost equally often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Floats, Ints
from pipeline.sampling.plan import Purpose, rng_for

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What epochs draw from a split of n shards with K strata; a pure function of seed and epoch.

    Attributes:
        weights: [n, K] float64, the summed weights of the samples of each shard in each stratum.
        quotas: [K] int64, number of samples that an epoch draws from each stratum; 0 where nothing has a weight.
        seed: decides where samples lie on their line.
    """

    weights: Floats
    quotas: Ints
    seed: int

    def _lines(self) -> Floats:
        """Return [n+1, K] where shards begin and end on the line of each stratum, which ends at its quota."""
        ends = np.concatenate([np.zeros((1, len(self.quotas))), np.cumsum(self.weights, axis=0)])
        return _scale(ends, self.quotas)

    def _phases(self, epoch: int) -> Floats:
        first: Floats = rng_for(Purpose.DRAWS, seed=self.seed, epoch=0).random(len(self.quotas))
        return (first + epoch * GOLDEN_RATIO) % 1.0

    def per_shard(self, epoch: int) -> Ints:
        """Return [n] int64, the number of samples that an epoch draws from each shard."""
        return np.diff(np.floor(self._lines() + self._phases(epoch)), axis=0).sum(axis=1).astype(np.int64)

    def copies(self, shard: int, stratum: Ints, weight: Floats, epoch: int) -> Ints:
        """Return [N] int64, how often an epoch uses each sample of a shard; ``stratum`` [N] and ``weight`` [N]."""
        order = rng_for(Purpose.DRAWS, seed=self.seed, epoch=0, group=shard + 1).permutation(len(stratum))
        lines, phases, copies = self._lines()[shard : shard + 2], self._phases(epoch), np.zeros(len(stratum), np.int64)
        for number in np.unique(stratum):
            own = order[stratum[order] == number]
            first, last = lines[:, number]
            parts = _scale(np.concatenate([[0.0], np.cumsum(weight[own])]), last - first)
            ends = np.append(first + parts[:-1], last)
            ends[parts == last - first] = last
            copies[own] = np.diff(np.floor(np.minimum(ends, last) + phases[number]))
        return copies


def _scale(ends: Floats, length: npt.NDArray[Any] | float) -> Floats:
    """Return ends [n+1, …], which rise from 0, stretched to end exactly at ``length``; all 0 where they end at 0."""
    total = ends[-1]
    scaled = ends * length / np.where(total > 0, total, 1.0)
    return np.where((ends == total) & (total > 0), length, np.minimum(scaled, length))


def apportion(total: int, shares: npt.NDArray[Any]) -> Ints:
    """Return whole numbers [K] of sum ``total`` in proportion to ``shares`` [K], by the largest remainders.

    Where all shares are 0 so are the numbers.
    """
    if not shares.any():
        return np.zeros(len(shares), np.int64)
    exact = total * (shares / shares.sum())
    numbers = np.floor(exact).astype(np.int64)
    largest = np.argsort(numbers - exact, kind="stable")
    numbers[largest[: total - numbers.sum()]] += 1
    return numbers


def balance_quotas(total: int, counts: Ints) -> Ints:
    """Return the quotas [C+1], of sum ``total``, of C classes and of samples without a label; ``counts`` [C+1] exist.

    Samples without a label are drawn in proportion to their number, of the others all classes that occur equally often.
    """
    labelled, unlabelled = apportion(total, np.array([counts[:-1].sum(), counts[-1]]))
    return np.append(apportion(int(labelled), counts[:-1] > 0), unlabelled)


def mix_quotas(counts: Ints, shares: Floats, *, balanced: bool) -> Ints:
    """Return the quotas [D, K] of data sets with ``counts`` [D, K] samples, drawn in proportion to ``shares`` [D].

    Together they are as many as there are samples.  Within a data set they are in proportion to ``counts``, or
    ``balanced``.
    """
    of_data, divide = apportion(int(counts.sum()), shares), balance_quotas if balanced else apportion
    return np.stack([divide(int(total), own) for total, own in zip(of_data, counts, strict=True)])
