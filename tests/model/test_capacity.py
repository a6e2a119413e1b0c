"""Capacities: which batches they have room for, and that fillers weigh nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.capacity import MAX_CAPACITIES, BatchShape, fill_batch, fit_capacities
from model.config import Outcome
from model.losses import LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline import PatientBatch
from tests.model.helpers import NUM_CODES, counts_of, random_batch, tiny_model

ROOM = BatchShape(
    events=60, single_sets=3, sets=6, single_patients=1, patients=3, pairs=14, codes=NUM_CODES - 1, longest=40
)


def add(shape: BatchShape, room: BatchShape) -> BatchShape:
    """A capacity with some room; that for codes and the longest set is not added."""
    total = {f.name: getattr(shape, f.name) + getattr(room, f.name) for f in dataclasses.fields(shape)}
    return BatchShape(**total | {"codes": room.codes, "longest": room.longest})


def results(model: SeqSetVAE, batch: PatientBatch, prepared: PreparedBatch) -> dict[str, Tensor]:
    """Losses and gradients of a training step whose patients are those of ``batch``."""
    model.zero_grad()
    output = model.train()(prepared)
    losses = compute_losses(output, prepared.batch.label, LossOptions(), counts_of(batch), beta=0.1)
    losses.total.backward()
    found = {f.name: getattr(losses, f.name) for f in dataclasses.fields(losses)}
    found |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def test_numbers_of_a_batch() -> None:
    batch = dataclasses.replace(random_batch([[3, 1], [1]]), code=torch.tensor([2, 2, 3, 2, 5]))
    assert BatchShape.of(batch) == BatchShape(
        events=5, single_sets=2, sets=1, single_patients=1, patients=1, pairs=3, codes=3, longest=3
    )
    assert dataclasses.astuple(BatchShape.of(random_batch([]))) == (0,) * 8


SETS = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(sets=SETS, more=st.integers(0, 90), pairs=st.integers(0, 8), seed=st.integers(0, 9))
def test_fillers_weigh_nothing(sets: list[list[int]], more: int, pairs: int, seed: int) -> None:
    """Losses and gradients are those of the batch alone, to the rounding of sums over more rows."""
    batch, model = random_batch(sets, seed), tiny_model(dropout=0.2)
    room = dataclasses.replace(ROOM, events=ROOM.events + more, pairs=ROOM.pairs + pairs)
    capacity = add(BatchShape.of(batch), room)
    prepared = PreparedBatch.build(batch, seed=1, step=2, capacities=[capacity])
    if prepared.shape is None:  # a batch of two variables has too few for the fillers
        assert BatchShape.of(batch).codes < 7
        return
    filled = BatchShape.of(prepared.batch)
    assert dataclasses.replace(filled, codes=capacity.codes, longest=capacity.longest) == capacity
    found, alone = results(model, batch, prepared), results(model, batch, PreparedBatch.build(batch, seed=1, step=2))
    largest = max(float(expected.abs().max()) for expected in alone.values())
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_what_fillers_hold_changes_no_bit(seed: int) -> None:
    batch, model = random_batch([[3, 4, 1], [5, 17], [16, 2, 1]], seed), tiny_model(dropout=0.2)
    prepared = PreparedBatch.build(batch, seed=1, step=2, capacities=[add(BatchShape.of(batch), ROOM)])
    filled, (events, sets) = prepared.batch, (batch.num_events, batch.num_sets)
    others = dataclasses.replace(
        filled,
        value=torch.cat([batch.value, 50 * torch.randn(filled.num_events - events)]),
        has_value=torch.cat([batch.has_value, torch.ones(filled.num_events - events, dtype=torch.bool)]),
        minute=torch.cat([batch.minute, 1e4 * torch.rand(filled.num_sets - sets).cumsum(0)]),
        patient_id=[*batch.patient_id, *map(str, range(filled.num_patients - batch.num_patients))],
    )
    changed = PreparedBatch.build(others, seed=1, step=2)
    changed = dataclasses.replace(
        prepared, value=others.value[prepared.sets.event_of_slot], time=changed.time, features=changed.features,
        noise=changed.noise, batch=others,
    )  # fmt: skip
    found, expected = results(model, batch, changed), results(model, batch, prepared)
    assert not torch.equal(changed.value, prepared.value)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_all_batches_of_a_capacity_have_the_same_shapes() -> None:
    batches = [random_batch([[3, 4, 1], [5, 17]], 1), random_batch([[2], [3, 3], [6, 1]], 2)]
    numbers = [dataclasses.asdict(BatchShape.of(batch)) for batch in batches]
    capacity = add(BatchShape(**{name: max(n[name] for n in numbers) for name in numbers[0]}), ROOM)
    packed = [PreparedBatch.build(batch, seed=1, capacities=[capacity]).pack(pin=False) for batch in batches]
    assert all(batch.shape == capacity for batch in packed)
    buffers = [batch.buffer for batch in packed]
    assert buffers[0] is not None
    assert buffers[1] is not None
    assert buffers[0].shape == buffers[1].shape
    moved = packed[0].take(buffers[1])  # the second batch in the views of the first
    assert torch.equal(moved.value, packed[1].value)
    assert torch.equal(moved.sets.slot_offsets, packed[1].sets.slot_offsets)


def test_a_batch_without_room_stays_as_it_is() -> None:
    batch = random_batch([[3, 4, 1], [5, 17]])
    own = BatchShape.of(batch)
    for name in ("events", "single_sets", "sets", "patients", "pairs", "codes", "longest"):
        capacity = add(own, ROOM)
        small = dataclasses.replace(capacity, **{name: getattr(own, name) - 1})
        assert fill_batch(batch, [small]) is None, name
        assert PreparedBatch.build(batch, seed=1, capacities=[small]).shape is None
        found = fill_batch(batch, [small, capacity])
        assert found is not None
        assert found[1] == capacity
    assert fill_batch(batch, [own]) is None, "the rest of the room needs a filler patient"


def test_capacities_have_room_for_what_they_were_fitted_to() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        random_batch([torch.randint(1, 9, (int(n),), generator=generator).tolist() for n in row], seed)
        for seed, row in enumerate(torch.randint(2, 12, (40, 6), generator=generator))
    ]
    capacities = fit_capacities([BatchShape.of(batch) for batch in batches], num_codes=NUM_CODES)
    assert 1 < len(capacities) <= MAX_CAPACITIES
    assert all(capacity.codes < NUM_CODES for capacity in capacities)
    assert [*capacities] == sorted(capacities)
    filled = [fill_batch(batch, capacities) for batch in batches]
    assert sum(found is not None for found in filled) >= 36
    assert fit_capacities([], num_codes=NUM_CODES) == ()


def test_fillers_have_no_label_of_any_task() -> None:
    """Two tasks, a number and classes: a packed batch with fillers has the losses of the batch without."""
    outcomes = (Outcome(name="los", kind="regression", classes=()), Outcome(name="ward"))
    model = tiny_model(outcomes=outcomes)
    batch = random_batch([[3, 4, 1], [5, 17], [2]])
    batch = dataclasses.replace(batch, label=torch.tensor([[1.5, 1.0], [math.nan, 0.0], [-2.0, math.nan]]))
    capacity = add(BatchShape.of(batch), ROOM)
    prepared = PreparedBatch.build(batch, seed=1, step=2, capacities=[capacity]).pack(pin=False)
    assert prepared.shape == capacity
    assert prepared.batch.label[3:].isnan().all()
    found, alone = results(model, batch, prepared), results(model, batch, PreparedBatch.build(batch, seed=1, step=2))
    largest = max(float(expected.abs().max()) for expected in alone.values())
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6 * largest, msg=name)
