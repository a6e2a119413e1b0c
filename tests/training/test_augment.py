from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.loading.batch import PatientBatch
from pipeline.loading.place import BatchPlace, GlobalBatch, StepCounts
from tests.model.helpers import random_batch, select
from training.augment import count_after_dropout, drop_events

SIZES = [[1, 4, 2], [7], [3, 3, 3, 3], [1], [2, 9]]


def equal(left: PatientBatch, right: PatientBatch) -> bool:
    names = ("code", "value", "has_value", "set_offsets", "minute", "patient_offsets", "label")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def test_what_is_left_out_does_not_depend_on_the_batch() -> None:
    batch = random_batch(SIZES)
    dropped = drop_events(batch, 0.5, seed=1, step=2)
    assert 0 < dropped.num_events < batch.num_events
    for patients in ([2], [4, 0], [3, 2, 1]):
        alone = drop_events(select(batch, patients), 0.5, seed=1, step=2)
        assert equal(alone, select(dropped, patients))


def test_every_step_and_seed_leaves_out_another_part() -> None:
    batch = random_batch([[5] * 20] * 4)
    parts = [drop_events(batch, 0.3, seed=seed, step=step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert equal(parts[0], drop_events(batch, 0.3, seed=0, step=0))
    assert not any(equal(parts[0], other) for other in parts[1:])


def test_the_rate_is_a_mean_and_differs_between_patients() -> None:
    batch = random_batch([[4] * 50] * 400)
    kept = drop_events(batch, 0.3, seed=0, step=0).events_per_patient / 200
    assert abs(kept.mean() - 0.7) < 0.03
    assert kept.min() < 0.45
    assert kept.max() > 0.95


def test_a_patient_keeps_its_first_event() -> None:
    batch = random_batch([[1], [1], [1, 1]] * 40)
    dropped = drop_events(batch, 0.5, seed=0, step=0)
    assert int(dropped.events_per_patient.min()) == 1
    first = dropped.set_offsets[dropped.patient_offsets[:-1]]
    assert torch.equal(dropped.code[first], batch.code[batch.set_offsets[batch.patient_offsets[:-1]]])


def test_a_rate_of_nothing_changes_nothing() -> None:
    batch = random_batch(SIZES)
    assert drop_events(batch, 0.0, seed=0, step=0) is batch


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=9), st.integers(0, 3))
def test_counts_after_dropout_are_those_of_the_batch_with_sets_that_vanish(sizes: list[list[int]], step: int) -> None:
    """As every rank computes them of the global batch, from ids and lengths alone."""
    batch = random_batch(sizes)
    counts = StepCounts(
        num_patients=len(sizes), num_labelled=(5,), num_sets=batch.num_sets, num_events=batch.num_events
    )
    whole = GlobalBatch(
        sample_key=batch.patient_id,
        num_sets=np.array([len(sets) for sets in sizes], np.int64),
        set_size=np.array([size for sets in sizes for size in sets], np.int64),
    )
    place = BatchPlace(epoch=0, cursor=0, step=step, counts=counts, global_batch=lambda: whole)
    dropped = drop_events(batch, 0.5, seed=7, step=step)
    found = count_after_dropout(place, 0.5, seed=7)
    assert (found.num_events, found.num_sets, found.num_labelled) == (dropped.num_events, dropped.num_sets, (5,))
