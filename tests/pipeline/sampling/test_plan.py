from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.arrays import Ints
from pipeline.sampling.cost import CostModel
from pipeline.sampling.plan import EpochPlan, Purpose, _jitter_widths, plan_epoch, rng_for, split_across_ranks
from pipeline.sampling.policy import Policy
from pipeline.sampling.quality import neighbour_correlation, padding_waste, pairs_meeting_again, rank_imbalance
from pipeline.schema import UserError

Lengths = npt.NDArray[np.int64]


def icu_like(count: int, *, seed: int = 0) -> tuple[Lengths, Lengths]:
    """Events and sets of stays with a spread like that of real ones."""
    rng = np.random.default_rng(seed)
    num_events = np.clip(np.exp(rng.normal(6.0, 0.45, count)), 5, 1500).astype(np.int64)
    return num_events, np.maximum(1, (num_events * rng.uniform(0.1, 0.3, count)).astype(np.int64))


def batches(plan: EpochPlan) -> list[list[int]]:
    return [plan.patients(step).tolist() for step in range(plan.num_batches)]


POLICIES = st.builds(
    Policy,
    batch_size=st.integers(1, 20),
    max_events=st.none() | st.integers(60, 400),
    bucketing=st.booleans(),
    bucket_width=st.floats(0, 30),
    shuffle=st.booleans(),
) | st.builds(Policy, batch_size=st.none(), max_events=st.integers(60, 400))
LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), max_size=70)


@given(LENGTHS, POLICIES, st.integers(0, 5), st.integers(0, 2**40))
def test_every_patient_is_in_exactly_one_batch_within_every_limit(
    lengths: list[tuple[int, int]], policy: Policy, epoch: int, seed: int
) -> None:
    num_events, num_sets = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    plan = plan_epoch(num_events, num_sets, policy, seed=seed, epoch=epoch)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    for patients in batches(plan):
        assert 1 <= len(patients) <= (policy.batch_size or len(lengths))
        if policy.max_events is not None:
            assert num_events[patients].sum() <= policy.max_events
    if policy.max_events is None:
        assert plan.num_batches == -(-len(lengths) // policy.batch_size)  # type: ignore[operator]
        assert sum(size < policy.batch_size for size in plan.batch_sizes) <= 1  # type: ignore[operator]
    again = plan_epoch(num_events, num_sets, policy, seed=seed, epoch=epoch)
    assert batches(again) == batches(plan)


@given(LENGTHS, POLICIES, st.integers(1, 7))
def test_ranks_share_each_batch_and_rotate(lengths: list[tuple[int, int]], policy: Policy, world_size: int) -> None:
    num_events, num_sets = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    plan = plan_epoch(num_events, num_sets, policy, seed=1, epoch=0)
    cost = CostModel().predict(num_events, num_sets)
    shares = [split_across_ranks(plan, cost, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(share.num_batches == plan.num_batches for share in shares)
    for step, patients in enumerate(batches(plan)):
        dealt = [share.patients(step).tolist() for share in shares]
        assert Counter(chain.from_iterable(dealt)) == Counter(patients)
        assert sum(bool(part) for part in dealt) == min(world_size, len(patients)), (
            "no rank idles while another has two"
        )
        # What the greedy deal promises: the dearest rank would be no better off without its last patient.
        loads = [cost[part].sum() for part in dealt]
        assert max(loads) - min(loads) <= cost[patients].max() + 1e-9


def test_a_budget_is_filled_greedily_by_hand() -> None:
    num_events = np.array([1, 2, 3, 4, 5, 6])
    ragged = Policy(batch_size=None, max_events=10, shuffle=False)
    assert batches(plan_epoch(num_events, num_events, ragged, seed=0, epoch=0)) == [[0, 1, 2, 3], [4], [5]]
    both = replace(ragged, batch_size=2)
    assert batches(plan_epoch(num_events, num_events, both, seed=0, epoch=0)) == [[0, 1], [2, 3], [4], [5]]


def test_a_budget_of_cost_is_filled_to_its_limit_by_hand() -> None:
    num_events = np.array([4, 5, 5, 6])
    cost = CostModel(event=1, set=0, set_squared=0, patient=0, batch=2)
    for limit, expected in ((10, [[0], [1], [2], [3]]), (11, [[0, 1], [2], [3]]), (13, [[0, 1], [2, 3]])):
        policy = Policy(batch_size=None, max_cost=limit, budget=cost, shuffle=False)
        assert batches(plan_epoch(num_events, num_events, policy, seed=0, epoch=0)) == expected, limit


def test_jitter_widths_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps over one neighbour on each side are 1/2, 3/3 and 3/2; patients a batch 2, 1 and 1."""
    monkeypatch.setattr("pipeline.sampling.plan.GAP_REACH", 1)
    shares = np.array([0.5**0.5 / 2, 1.0, 1.5**0.5])
    found = _jitter_widths(np.array([1, 1, 3]), np.array([2, 1, 1]))
    np.testing.assert_allclose(found, shares * 2.5 / shares.sum())


def test_evaluation_goes_by_events_or_as_stored() -> None:
    num_events, num_sets = np.array([5, 1, 5, 3]), np.array([1, 1, 2, 3])
    for bucketing, order in ((True, [1, 3, 0, 2]), (False, [0, 1, 2, 3])):
        policy = Policy(batch_size=3, shuffle=False, bucketing=bucketing)
        plans = [plan_epoch(num_events, num_sets, policy, seed=0, epoch=epoch) for epoch in (0, 1)]
        assert [batches(plan) for plan in plans] == [[order[:3], order[3:]]] * 2


def test_the_smaller_batch_is_not_always_the_one_of_the_longest_patients() -> None:
    num_events = np.arange(1, 106)
    policy = Policy(batch_size=10, bucket_width=0)
    means = set()
    for epoch in range(40):
        plan = plan_epoch(num_events, num_events, policy, seed=0, epoch=epoch)
        (small,) = np.flatnonzero(plan.batch_sizes == 5)
        means.add(num_events[plan.patients(int(small))].mean())
    assert len(means) > 5


def test_epochs_and_seeds_differ() -> None:
    num_events, num_sets = icu_like(200)
    plans = [
        batches(plan_epoch(num_events, num_sets, Policy(), seed=seed, epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(plans[a] != plans[b] for a in range(4) for b in range(a))


def test_grouping_saves_padding_and_still_mixes() -> None:
    num_events, num_sets = icu_like(4000)
    waste, meeting = {}, {}
    for width in (0.0, 2.0, 4.0, 8.0):
        plans = [
            plan_epoch(num_events, num_sets, Policy(bucket_width=width), seed=0, epoch=epoch) for epoch in range(4)
        ]
        waste[width] = np.mean([padding_waste(plan, num_events) for plan in plans])
        meeting[width] = np.mean([pairs_meeting_again(*pair) for pair in pairwise(plans)])
    assert list(waste) == sorted(waste, key=waste.__getitem__), "a wider bucket pads more"
    assert list(meeting) == sorted(meeting, key=meeting.__getitem__, reverse=True), "and mixes more"
    control = plan_epoch(num_events, num_sets, Policy(bucketing=False), seed=0, epoch=0)
    assert padding_waste(control, num_events) > 0.3
    assert waste[4.0] < 0.03
    assert meeting[4.0] < 0.16


def test_where_all_are_alike_grouping_is_free_and_changes_nothing() -> None:
    num_events = num_sets = np.full(1600, 7)
    plans = [plan_epoch(num_events, num_sets, Policy(), seed=0, epoch=epoch) for epoch in (0, 1)]
    chance = 15 / 1599
    assert padding_waste(plans[0], num_events) == 0
    assert pairs_meeting_again(*plans) == pytest.approx(chance, abs=chance)


def test_neighbouring_batches_are_not_alike() -> None:
    num_events, num_sets = icu_like(4000)
    plans = [plan_epoch(num_events, num_sets, Policy(), seed=3, epoch=epoch) for epoch in range(40)]
    # 250 batches an epoch: chance alone gives one epoch's r a deviation of 0.063, the mean of 40 one of 0.01.
    assert abs(np.mean([neighbour_correlation(plan, num_events) for plan in plans])) < 0.05


def test_ranks_have_like_costs_each_step_and_like_counts_each_epoch() -> None:
    num_events, num_sets = icu_like(4000)
    cost = CostModel().predict(num_events, num_sets)
    plan = plan_epoch(num_events, num_sets, Policy(), seed=0, epoch=0)
    assert rank_imbalance(plan, cost, 4) < 0.05
    for world_size in (2, 3, 4, 5):
        counts = [
            len(split_across_ranks(plan, cost, rank=rank, world_size=world_size).order) for rank in range(world_size)
        ]
        assert max(counts) <= 1.05 * min(counts)


def test_the_rank_with_a_patient_more_changes_with_the_step() -> None:
    alike = np.full(500, 7)
    plan = plan_epoch(alike, alike, Policy(batch_size=5), seed=0, epoch=0)
    for rank in range(4):
        share = split_across_ranks(plan, alike.astype(np.float64), rank=rank, world_size=4)
        assert share.batch_sizes.tolist() == [2 if step % 4 == rank else 1 for step in range(100)]
        later = split_across_ranks(plan, alike.astype(np.float64), rank=rank, world_size=4, first_step=3)
        assert later.batch_sizes.tolist() == [2 if (step + 3) % 4 == rank else 1 for step in range(100)]


def test_costs_by_hand() -> None:
    model = CostModel(event=1.0, set=10.0, set_squared=100.0, patient=1000.0)
    assert model.predict(np.array([5, 0]), np.array([2, 1])).tolist() == [5 + 20 + 400 + 1000, 10 + 100 + 1000]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": None}, "give --batch_size, --max_events or both"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"max_events": -3}, "--max_events must be at least 1, not -3"),
        ({"bucket_width": -0.5}, "--bucket_width must be .* not -0.5"),
        ({"bucket_width": float("nan")}, "--bucket_width must be .* not nan"),
        ({"bucket_width": float("inf")}, "--bucket_width must be .* not inf"),
        ({"bucketing": "age"}, "--bucketing must be true or false, not 'age'"),
    ],
)
def test_a_policy_out_of_range_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy(**fields)  # type: ignore[arg-type]


def test_a_patient_beyond_the_budget_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        UserError, match="a patient has 50 events; raise it, or cut patients with --max_sequence_length"
    ):
        plan_epoch(np.array([3, 50]), np.array([1, 2]), Policy(max_events=49), seed=0, epoch=0)
    assert plan_epoch(np.array([3, 50]), np.array([1, 2]), Policy(max_events=50), seed=0, epoch=0).num_batches == 2


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="--seed -1: must be 0 or more"):
        plan_epoch(np.array([3]), np.array([1]), Policy(), seed=-1, epoch=0)


def read_lengths(set_a_dir: Path) -> tuple[Ints, Ints]:
    """Events and sets of each stay of set A."""
    rows = [set(path.read_text().splitlines()[2:]) for path in sorted(set_a_dir.iterdir())]
    num_events = np.array([max(len(events), 1) for events in rows])
    return num_events, np.array([max(len({event[:5] for event in events}), 1) for events in rows])


@pytest.mark.parametrize(
    "device", [CostModel(set=0, patient=0), CostModel(event=0, patient=0), CostModel(patient=300)], ids=str
)
def test_ranks_are_alike_on_real_stays_whatever_an_event_costs_there(device: CostModel, set_a_dir: Path) -> None:
    """Patients are dealt by the cost on a CPU; the slowest rank has little more to do than the mean, on any device."""
    num_events, num_sets = read_lengths(set_a_dir)
    plan = plan_epoch(num_events, num_sets, Policy(batch_size=128), seed=0, epoch=0)
    dealt, true = (cost.predict(num_events, num_sets) for cost in (CostModel(), device))
    shares = [split_across_ranks(plan, dealt, rank=rank, world_size=8) for rank in range(8)]
    costs = np.stack([share.sum_per_batch(true) for share in shares])
    assert costs.max(axis=0).sum() < 1.03 * costs.mean(axis=0).sum()


def test_real_stays_waste_and_mix_as_promised(set_a_dir: Path) -> None:
    num_events, num_sets = read_lengths(set_a_dir)
    measured = {}
    for width in (4.0, 5.0):
        plans = [
            plan_epoch(num_events, num_sets, Policy(bucket_width=width), seed=0, epoch=epoch) for epoch in range(6)
        ]
        measured[width] = (
            np.mean([padding_waste(plan, num_events) for plan in plans]),
            np.mean([pairs_meeting_again(*pair) for pair in pairwise(plans)]),
        )
    for width, most_waste, most_meeting in ((4.0, 0.020, 0.15), (5.0, 0.027, 0.12)):
        waste, meeting = measured[width]
        assert waste < most_waste
        assert meeting < most_meeting


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), max_size=60),
    st.floats(1, 400),
    st.one_of(st.none(), st.integers(1, 9)),
    st.booleans(),
)
def test_batches_cost_no_more_than_their_limit_or_are_one_patient(
    lengths: list[tuple[int, int]], limit: float, batch_size: int | None, shuffle: bool
) -> None:
    num_events = np.array([events for events, _ in lengths], np.int64)
    num_sets = np.array([min(sets, events) for events, sets in lengths], np.int64)
    cost = CostModel(event=1, set=2, set_squared=0.1, patient=3, batch=7)
    policy = Policy(batch_size=batch_size, max_cost=limit + 7, budget=cost, shuffle=shuffle)
    plan = plan_epoch(num_events, num_sets, policy, seed=1, epoch=2)
    assert sorted(plan.order) == list(range(len(lengths)))
    costs = plan.sum_per_batch(cost.predict(num_events, num_sets))
    assert ((costs <= limit * (1 + 1e-9)) | (plan.batch_sizes == 1)).all()
    assert (plan.batch_sizes <= (batch_size or len(lengths))).all()
    if batch_size is None and len(lengths) and not shuffle:  # in order of length each batch takes all that it can
        first = np.cumsum(plan.batch_sizes)[:-1]
        assert (costs[:-1] + cost.predict(num_events, num_sets)[plan.order[first]] > limit * (1 - 1e-9)).all()


def test_a_limit_below_what_a_batch_costs_without_patients_is_refused() -> None:
    with pytest.raises(UserError, match="without patients it costs 7"):
        Policy(max_cost=7, budget=CostModel(batch=7))


@pytest.mark.parametrize(
    ("fields", "fingerprint"),
    [
        ({"batch_size": 6}, "556e202888a9ae0a"),
        ({"batch_size": None, "max_events": 150}, "8654fa43da891297"),
        ({"batch_size": 8, "max_cost": 600.0}, "cbd3ba5195d4e8ef"),
        ({"batch_size": 7, "bucketing": False}, "42d027edb083008d"),
        ({"batch_size": 7, "shuffle": False}, "81217dc64942b312"),
    ],
)
def test_plans_are_those_of_earlier_versions(fields: dict[str, Any], fingerprint: str) -> None:
    """A run that is resumed, or repeated from its config, has the batches that it began with."""
    num_events = np.arange(40) * 37 % 101 + 1
    digest = sha256()
    for epoch, group in product(range(2), range(2)):
        plan = plan_epoch(num_events, (num_events + 2) // 3, Policy(**fields), seed=5, epoch=epoch, group=group)
        digest.update(plan.order.astype("<i8").tobytes() + plan.batch_offsets.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == fingerprint


def test_each_purpose_has_the_random_numbers_of_earlier_versions() -> None:
    drawn = {purpose: rng_for(purpose, seed=5, epoch=2).integers(1000, size=6).tolist() for purpose in Purpose}
    assert drawn == {
        Purpose.PLAN: [792, 237, 711, 427, 76, 591],
        Purpose.TRUNCATION: [665, 795, 373, 556, 201, 175],
        Purpose.SHARD_ORDER: [890, 655, 824, 372, 496, 122],
        Purpose.DRAWS: [500, 766, 939, 777, 692, 475],
    }
    of_group = rng_for(Purpose.TRUNCATION, seed=5, epoch=2, group=3)
    assert of_group.integers(1000, size=6).tolist() == [628, 894, 891, 674, 331, 13]
