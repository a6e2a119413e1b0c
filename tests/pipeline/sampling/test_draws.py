from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.arrays import Ints
from pipeline.sampling.draws import GOLDEN_RATIO, Draws, apportion, balance_quotas, mix_quotas
from pipeline.sampling.plan import Purpose, rng_for
from tests.faults.conftest import cases

SAMPLES = st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=9), min_size=1, max_size=6)
"""Of each shard the stratum and the weight of each sample."""

Shards = list[list[tuple[int, int]]]


def make_draws(shards: Shards, quotas: list[int], seed: int) -> Draws:
    weights = np.zeros((len(shards), 3))
    for number, samples in enumerate(shards):
        for stratum, weight in samples:
            weights[number, stratum] += weight
    has_weight = weights.sum(axis=0) > 0
    return Draws(weights=weights, quotas=np.where(has_weight, quotas, 0).astype(np.int64), seed=seed)


def copies_of(draws: Draws, shards: Shards, epoch: int) -> list[list[int]]:
    found = []
    for number, samples in enumerate(shards):
        stratum, weight = np.array(samples, np.int64).reshape(-1, 2).T
        found.append(draws.copies(number, stratum, weight.astype(float), epoch).tolist())
    return found


def expected_copies(draws: Draws, shards: Shards, epoch: int) -> list[list[int]]:
    """Lay the samples of each stratum end to end, one by one, and count the whole numbers in each."""
    phases = rng_for(Purpose.DRAWS, seed=draws.seed, epoch=0).random(3) + epoch * GOLDEN_RATIO
    found = [[0] * len(samples) for samples in shards]
    for stratum in range(3):
        total, phase, before = draws.weights[:, stratum].sum(), float(phases[stratum]) % 1.0, 0
        for number, samples in enumerate(shards):
            order = rng_for(Purpose.DRAWS, seed=draws.seed, epoch=0, group=number + 1).permutation(len(samples))
            for position in order.tolist():
                if samples[position][0] != stratum:
                    continue
                after = before + samples[position][1]
                ends = (end * int(draws.quotas[stratum]) / max(total, 1) + phase for end in (before, after))
                first, last = map(math.floor, ends)
                found[number][position], before = last - first, after
    return found


@given(SAMPLES, st.lists(st.integers(0, 30), min_size=3, max_size=3), st.integers(0, 2**40), st.integers(0, 9))
def test_an_epoch_draws_what_the_reference_draws_and_each_quota_exactly(
    shards: Shards, quotas: list[int], seed: int, epoch: int
) -> None:
    draws = make_draws(shards, quotas, seed)
    copies = copies_of(draws, shards, epoch)
    assert copies == expected_copies(draws, shards, epoch)
    assert draws.per_shard(epoch).tolist() == [sum(of_shard) for of_shard in copies]
    drawn = [0, 0, 0]
    for samples, of_shard in zip(shards, copies, strict=True):
        for (stratum, weight), number in zip(samples, of_shard, strict=True):
            drawn[stratum] += number
            due = weight * int(draws.quotas[stratum]) / max(draws.weights[:, stratum].sum(), 1)
            assert math.floor(due) <= number <= math.ceil(due)
    assert drawn == draws.quotas.tolist()


@settings(max_examples=cases(20, 60))
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 2**40))
def test_samples_of_equal_weight_are_used_almost_equally_often_over_epochs(
    sizes: list[int], quota: int, seed: int
) -> None:
    assume(sum(sizes))
    shards: Shards = [[(0, 1)] * size for size in sizes]
    draws, total = make_draws(shards, [quota, 0, 0], seed), np.zeros(sum(sizes), np.int64)
    for epoch in range(25):
        total += np.concatenate(copies_of(draws, shards, epoch)).astype(np.int64)
        assert np.ptp(total) <= 3, "by chance alone it would be ten"
        assert abs(total - (epoch + 1) * quota / sum(sizes)).max() < 3


def test_other_samples_are_left_out_each_epoch() -> None:
    draws, shards = make_draws([[(0, 1)] * 90], [30, 0, 0], 0), [[(0, 1)] * 90]
    used = [set(np.flatnonzero(copies_of(draws, shards, epoch)[0]).tolist()) for epoch in range(4)]
    assert all(len(epoch) == 30 for epoch in used)
    assert used[0] != used[1]
    assert len(set.union(*used)) == 90, "after four epochs of a third each nobody is left out"


@given(st.integers(0, 10**6), st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_numbers_are_in_proportion_and_their_sum_is_exact(total: int, shares: list[float]) -> None:
    numbers = apportion(total, np.array(shares))
    if not sum(shares):
        assert numbers.tolist() == [0] * len(shares)
        return
    assert numbers.sum() == total
    for number, share in zip(numbers.tolist(), shares, strict=True):
        assert abs(number - total * share / sum(shares)) < 1 + 1e-6
        assert share or not number


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([90, 10, 0], [50, 50, 0]),
        ([9, 2, 4], [6, 5, 4]),
        ([6, 0, 3, 1], [5, 0, 4, 1]),
        ([0, 0, 7], [0, 0, 7]),
    ],
)
def test_quotas_of_classes_by_hand(counts: list[int], expected: list[int]) -> None:
    """The last is of samples without a label; a class that does not occur is not drawn."""
    assert balance_quotas(sum(counts), np.array(counts)).tolist() == expected


def test_quotas_of_data_sets_by_hand() -> None:
    assert balance_quotas(20, np.array([6, 0, 3, 1])).tolist() == [9, 0, 9, 2]
    counts: Ints = np.array([[60, 20, 20], [80, 20, 0]])
    assert mix_quotas(counts, np.array([1.0, 3.0]), balanced=False).tolist() == [[30, 10, 10], [120, 30, 0]]
    assert mix_quotas(counts, np.array([1.0, 1.0]), balanced=True).tolist() == [[40, 40, 20], [50, 50, 0]]
