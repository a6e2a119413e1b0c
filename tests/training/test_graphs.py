"""Steps as graphs, with a stand-in for a GPU's: a replay makes the step of the batch of now, not of that of then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.capacity import BatchShape
from model.kernels.ops import choose_kernels
from model.losses import Losses, LossOptions
from pipeline import PatientBatch
from tests.model.helpers import NUM_CODES, counts_of, random_batch, tiny_model
from training.data import BatchPreparer, ReadyBatch
from training.graphs import StepGraphs, StepNumbers
from training.metrics import BatchAmounts
from training.parallel import World
from training.schedule import OptimisationOptions
from training.state import TrainState, build_state
from training.step import StepSettings, train_step

CPU = torch.device("cpu")
CAPACITY = BatchShape(
    events=32, single_sets=2, sets=5, single_patients=0, patients=4, pairs=18, codes=NUM_CODES - 1, longest=20
)
SIZES = [[[3, 1], [5]], [[2, 4], [4]], [[1, 1, 1], [2]], [[1, 3], [6]]]


def capture(run: Callable[[], tuple[Losses, Tensor]], _: object) -> tuple[Callable[[], None], tuple[Losses, Tensor]]:
    """Do nothing now, as a GPU does; at each replay run it all again, and write to the same outputs."""
    names = [f.name for f in dataclasses.fields(Losses)]
    losses, norm = Losses(**{name: torch.zeros(1 if name == "tasks" else ()) for name in names}), torch.zeros(())

    def replay() -> None:
        found, found_norm = run()
        for name in names:
            getattr(losses, name).copy_(getattr(found, name))
        norm.copy_(found_norm)

    return replay, (losses, norm)


def ready_batch(batch: PatientBatch, step: int, *, capacities: tuple[BatchShape, ...]) -> ReadyBatch:
    prepared = BatchPreparer(seed=1, capacities=capacities).prepare(batch, step).pack(pin=False)
    assert prepared.shape in (*capacities, None)
    return ReadyBatch(parts=[prepared], batch=batch, counts=counts_of(batch), amounts=BatchAmounts.of(batch))


def train(graphs: StepGraphs | None) -> tuple[TrainState, list[float], list[float]]:
    """Four steps; the third batch has no room in the capacity."""
    options, loader = OptimisationOptions(warmup_steps=3, learning_rate=1e-2), Any
    state = build_state(tiny_model(dropout=0.2, heads=1, levels=1, layers=1), loader, options)
    world, preparer = World(0, 1, CPU), BatchPreparer(seed=1)
    settings = StepSettings(LossOptions(beta_warmup_steps=9), options, world, 12, preparer, graphs)
    totals, norms = [], []
    for step, sizes in enumerate(SIZES):
        ready = ready_batch(random_batch(sizes, step), step, capacities=(CAPACITY,))
        assert (ready.parts[0].shape is None) == (step == 2)
        losses, norm = train_step(state, ready, settings)
        totals.append(losses.total.item())
        norms.append(norm.item())
    return state, totals, norms


def test_replayed_steps_are_the_steps() -> None:
    pytest.importorskip("triton")  # its interpreter: what PyTorch runs here looks at the sizes of each batch
    graphs = StepGraphs(CPU, capture)
    with choose_kernels(True):
        state, totals, norms = train(graphs)
    expected, expected_totals, expected_norms = train(None)
    assert graphs.replayed == 2, "without the first of the capacity, and without the one for which there is no room"
    assert totals == pytest.approx(expected_totals, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    assert state.progress.step == expected.progress.step == len(SIZES)
    for name in ("model", "ema_model"):
        found, wanted = (getattr(s, name).state_dict() for s in (state, expected))
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-3, msg=key)


def test_numbers_survive_being_flat() -> None:
    numbers = StepNumbers(counts=counts_of(random_batch([[3, 1]])), beta=0.5, ema_decay=0.25, learning_rates=[1.0, 2.0])
    taken = numbers.take(torch.tensor(numbers.flatten()))
    assert taken.flatten() == numbers.flatten() == [0.5, 0.25, 4, 2, 1, 1, 2]
