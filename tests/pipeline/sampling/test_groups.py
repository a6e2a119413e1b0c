from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampling.groups import Group, Grouping, group_shards
from pipeline.sampling.policy import Policy

SHARDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), max_size=12)  # patients, events of each


def grouped(
    num_patients: list[int], num_events: list[int], *, group_events: int, multiple: int = 1, **given: int
) -> Grouping:
    options = {"shuffle": False, "seed": 0, "epoch": 0} | given
    counts = np.array(num_patients, np.int64), np.array(num_events, np.int64)
    policy = Policy(batch_size=multiple, shuffle=bool(options.pop("shuffle")))
    return group_shards(*counts, policy, group_events=group_events, **options)


def groups(grouping: Grouping) -> list[Group]:
    return [grouping.group(number) for number in range(grouping.num_groups)]


def test_a_cut_between_shards_by_hand() -> None:
    first, second = groups(grouped([4, 4, 4, 4], [40, 40, 40, 40], group_events=80))
    assert (first.shards.tolist(), first.patients.tolist()) == ([0, 1], [*range(8)])
    assert (second.shards.tolist(), second.patients.tolist()) == ([2, 3], [*range(8)])


def test_a_border_moves_to_a_whole_batch_by_hand() -> None:
    """8 patients are two batches of 3 and two left over, which the next group takes from the second shard."""
    grouping = grouped([4, 4, 4, 4], [40, 40, 40, 40], group_events=80, multiple=3)
    assert grouping.borders.tolist() == [0, 6, 16]
    first, second = groups(grouping)
    assert (first.shards.tolist(), first.patients.tolist()) == ([0, 1], [0, 1, 2, 3, 4, 5])
    assert (second.shards.tolist(), second.patients.tolist()) == ([1, 2, 3], [2, 3, *range(4, 12)])


def test_shards_of_a_group_are_in_the_manifest_s_order_by_hand() -> None:
    grouping = Grouping(num_patients=np.array([3, 2, 4]), shard_order=np.array([2, 0, 1]), borders=np.array([0, 5, 9]))
    first, second = groups(grouping)
    assert (first.shards.tolist(), first.patients.tolist()) == ([0, 2], [0, 3, 4, 5, 6])
    assert (second.shards.tolist(), second.patients.tolist()) == ([0, 1], [1, 2, 3, 4])


@given(SHARDS, st.integers(1, 300), st.integers(1, 12), st.booleans(), st.integers(0, 2**40), st.integers(0, 3))
def test_groups_are_all_patients_once_within_the_limit(
    shards: list[tuple[int, int]], group_events: int, multiple: int, shuffle: bool, seed: int, epoch: int
) -> None:
    num_patients = [patients for patients, _ in shards]
    num_events = [patients * events for patients, events in shards]
    options = {"shuffle": shuffle, "seed": seed, "epoch": epoch}
    grouping = grouped(num_patients, num_events, group_events=group_events, multiple=multiple, **options)
    found = []
    for group in groups(grouping):
        assert group.shards.tolist() == sorted(set(group.shards.tolist()))
        naive = [(shard, row) for shard in group.shards.tolist() for row in range(num_patients[shard])]
        members = [naive[patient] for patient in group.patients.tolist()]
        assert {shard for shard, _ in members} == set(group.shards.tolist()), "no shard is read for nothing"
        found.append(members)
    assert sorted(chain.from_iterable(found)) == [
        (shard, row) for shard, patients in enumerate(num_patients) for row in range(patients)
    ]
    assert all(len(members) % multiple == 0 for members in found[:-1])
    if sum(num_events) <= group_events:
        assert len(found) == 1
    if multiple == 1:
        for members in found:
            events = sum(shards[shard][1] for shard, _ in members)
            assert events < group_events + max(num_events, default=1)
    if not shuffle:
        assert list(chain.from_iterable(found)) == sorted(chain.from_iterable(found))


def test_epochs_and_seeds_put_other_shards_together() -> None:
    members = [
        frozenset(
            frozenset(group.shards.tolist())
            for group in groups(grouped([5] * 40, [50] * 40, group_events=500, shuffle=1, seed=seed, epoch=epoch))
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(members)) == 4


def test_the_order_of_shards_is_that_of_earlier_versions() -> None:
    num_patients = [number * 37 % 101 + 1 for number in range(12)]
    events = [5 * patients for patients in num_patients]
    grouping = grouped(num_patients, events, group_events=600, multiple=4, shuffle=1, seed=5, epoch=1)
    assert (grouping.shard_order.tolist(), grouping.borders.tolist()) == (
        [10, 5, 1, 6, 3, 7, 9, 2, 8, 0, 4, 11],
        [0, 68, 212, 312, 384, 535],
    )
