from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.arrays import Ints
from pipeline.sampling.apart import separate_copies
from pipeline.sampling.plan import plan_epoch
from pipeline.sampling.policy import Policy
from pipeline.sampling.quality import padding_waste


def repeats(order: Ints, offsets: Ints, sample: Ints) -> int:
    """How many patients of a batch are copies of others of it."""
    batches = [sample[order[a:b]].tolist() for a, b in pairwise(offsets)]
    return sum(len(batch) - len(set(batch)) for batch in batches)


def test_copies_part_by_hand() -> None:
    """The second 7 of the first batch changes places with the nearest of the next one, who fits."""
    sample, length = np.array([7, 7, 1, 1, 2, 3]), np.array([4, 4, 4, 4, 8, 5])
    order, offsets = np.arange(6), np.array([0, 3, 6])
    assert separate_copies(order, offsets, sample, length, []).tolist() == [0, 5, 2, 3, 4, 1]
    assert order.tolist() == [*range(6)], "what was given stays"
    assert separate_copies(order, offsets, sample, length, [(length, 17)]).tolist() == [0, 5, 2, 3, 4, 1]
    assert separate_copies(order, offsets, sample, length, [(length, 12)]).tolist() == [*range(6)], "no batch may grow"


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=60),
    st.integers(1, 9),
    st.none() | st.integers(12, 40),
)
def test_patients_sizes_and_limits_stay_and_no_more_copies_meet(
    patients: list[tuple[int, int]], size: int, limit: int | None
) -> None:
    sample, amount = np.array(patients).T
    offsets = np.append(np.arange(0, len(sample), size), len(sample))
    limits = [] if limit is None else [(amount, limit)]
    order = np.random.default_rng(0).permutation(len(sample))
    after = separate_copies(order, offsets, sample, amount, limits)
    assert sorted(after.tolist()) == [*range(len(sample))]
    assert repeats(after, offsets, sample) <= repeats(order, offsets, sample)
    for a, b in pairwise(offsets):
        before = amount[order[a:b]].sum()
        assert limit is None or amount[after[a:b]].sum() <= max(limit, before)


@pytest.mark.parametrize("policy", [Policy(), Policy(bucketing=False), Policy(batch_size=None, max_events=4000)])
def test_hardly_a_batch_of_a_balanced_epoch_holds_a_patient_twice(policy: Policy) -> None:
    """300 stays of 2,100 are drawn three or four times each, 1,050 of the others once."""
    rng = np.random.default_rng(0)
    sample = np.sort(np.concatenate([np.repeat(np.arange(300), 3), np.arange(150), np.arange(300, 1350)]))
    num_events = np.clip(np.exp(rng.normal(5.5, 0.5, 1350)), 5, 1500).astype(np.int64)[sample]
    for epoch in range(3):
        given = {"seed": 0, "epoch": epoch}
        plain, apart = (plan_epoch(num_events, num_events, policy, **given, sample=each) for each in (None, sample))
        assert (before := repeats(plain.order, plain.batch_offsets, sample)) > 5
        assert repeats(apart.order, apart.batch_offsets, sample) <= before // 20
        assert Counter(apart.order.tolist()) == Counter(range(len(sample)))
        if policy.max_events is not None:
            assert apart.sum_per_batch(num_events).max() <= policy.max_events
        wastes = [padding_waste(each, num_events) for each in (plain, apart)]
        assert wastes[1] < wastes[0] + 0.015, "and lengths stay as similar"
