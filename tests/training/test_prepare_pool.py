"""Batches that processes prepare are those that the thread prepares, and a run with them is the run without."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from model.capacity import BatchShape, fit_capacities
from model.prepared import PackedBatch, PreparedBatch
from pipeline import PatientBatch, make_loader
from tests.model.helpers import NUM_CODES, random_batch
from tests.training.runs import assert_same, run, weights, write_tiny_data
from training.data import BatchPreparer, ReadyBatch
from training.prepare_pool import PreparePool


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def same(found: Any, expected: Any) -> bool:
    """Compare tensors of nested dataclasses and lists, and all other values."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, PatientBatch):
        return all(same(found.__dict__[name], value) for name, value in expected.__dict__.items())
    if dataclasses.is_dataclass(expected):
        names = [f.name for f in dataclasses.fields(expected) if f.name != "buffer"]
        return all(same(getattr(found, name), getattr(expected, name)) for name in names)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def test_a_batch_survives_being_sent() -> None:
    batch = random_batch([[3, 4, 1], [5, 17], [2]])
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    capacities = fit_capacities([BatchShape.of(batch)], num_codes=NUM_CODES)
    for prepared in (PreparedBatch.build(batch), PreparedBatch.build(batch, seed=1, step=2, capacities=capacities)):
        sent = pickle.loads(pickle.dumps(PackedBatch.send(prepared)))
        received = sent.receive(pin=False)
        assert same(received, prepared)
        assert received.buffer is not None
        assert same(received.to("cpu"), prepared)


def test_a_rank_has_the_same_batches_in_the_same_order(
    data: Path, pool: Callable[[BatchPreparer, int], PreparePool]
) -> None:
    preparer = BatchPreparer(seed=1, event_dropout=0.3)
    found, expected = (
        list(make_loader(data, batch_size=4, seed=0, rank=1, world_size=2, prefetch=3, transform=transform))
        for transform in (pool(preparer, 2), preparer)
    )
    assert len(expected) > 3
    assert all(isinstance(ready, ReadyBatch) for ready in found)
    assert same(found, expected)


@pytest.fixture
def pool() -> Iterator[Callable[[BatchPreparer, int], PreparePool]]:
    """Opens pools of some processes, which end with the test."""
    opened: list[PreparePool] = []

    def open_pool(preparer: BatchPreparer, workers: int) -> PreparePool:
        opened.append(PreparePool(preparer, workers))
        return opened[-1]

    yield open_pool
    for each in opened:
        each.close()
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_errors_come_where_the_batch_would_have(data: Path, pool: Callable[[BatchPreparer, int], PreparePool]) -> None:
    broken = BatchPreparer(seed=1, event_dropout="much")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        list(make_loader(data, batch_size=4, transform=pool(broken, 1)))


def test_a_killed_process_ends_the_run_with_a_line(
    data: Path, pool: Callable[[BatchPreparer, int], PreparePool]
) -> None:
    batches = iter(make_loader(data, batch_size=1, prefetch=1, transform=pool(BatchPreparer(seed=1), 1)))
    next(batches)
    for child in psutil.Process().children():
        if "spawn_main" in " ".join(child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="lower --prefetch_workers"):
        list(batches)


def test_a_run_with_processes_is_the_run_without(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "thread", "--max_epochs", "1") == 0
    assert run(data, tmp_path / "processes", "--max_epochs", "1", "--prefetch_workers", "2") == 0
    assert_same(weights(tmp_path / "processes"), weights(tmp_path / "thread"))
