"""The loader where others look for an iterable of torch: in ``DataLoader``, and in loops that count."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from pipeline import make_loader
from pipeline.loading.batch import PatientBatch
from pipeline.loading.place import BatchPlace
from tests.faults.conftest import cases
from tests.pipeline.loading.test_batch import assert_equal
from tests.pipeline.loading.test_loader import ids
from tests.processes import Command

POLICIES = [{}, {"batch_size": 5, "group_events": 440}, {"max_events": 150}, {"max_events": 150, "group_events": 700}]
policies = pytest.mark.parametrize("policy", POLICIES, ids=str)


@policies
def test_a_data_loader_hands_out_the_same_batches_epoch_after_epoch(data_dir: Path, policy: dict[str, Any]) -> None:
    plain, inner = make_loader(data_dir, **policy), make_loader(data_dir, **policy)
    wrapped = DataLoader[PatientBatch](inner, batch_size=None)
    assert isinstance(inner, IterableDataset)
    for epoch in range(3):
        assert (len(wrapped), inner.epoch) == (len(plain), epoch)
        for ours, theirs in zip(plain, wrapped, strict=True):
            assert_equal(theirs, ours)
            assert inner.state_dict() == plain.state_dict()
    inner.load_state_dict(plain.state_dict() | {"epoch": 3, "cursor": 0})
    assert ids(islice(wrapped, 2)) + ids(wrapped) == ids(plain), "leaving early keeps the place"


def pad_and_count(batch: PatientBatch, place: BatchPlace) -> tuple[dict[str, torch.Tensor], int]:
    return batch.to_padded(), place.counts.num_events


def test_what_a_transform_makes_passes_through_a_data_loader(data_dir: Path) -> None:
    wrapped = DataLoader[Any](make_loader(data_dir, transform=pad_and_count), batch_size=None)
    for batch, (padded, num_events) in zip(make_loader(data_dir), wrapped, strict=True):
        assert num_events == batch.num_events
        assert all(torch.equal(padded[name], tensor) for name, tensor in batch.to_padded().items())


@policies
@pytest.mark.parametrize("prefetch", [0, 2])
def test_who_counts_batches_and_never_asks_for_the_end_gets_every_epoch(
    data_dir: Path, policy: dict[str, Any], prefetch: int
) -> None:
    plain, counted = make_loader(data_dir, **policy), make_loader(data_dir, **policy, prefetch=prefetch)
    for _ in range(3):
        length = len(plain)
        assert ids(islice(counted, length)) == ids(plain)
    assert (counted.epoch, counted.cursor, counted.step) == (2, len(counted), plain.step)


@lru_cache
def twelve_epochs(directory: Path, policy: int) -> list[list[str]]:
    loader = make_loader(directory, **POLICIES[policy])
    return [batch for _ in range(12) for batch in ids(loader)]


@settings(max_examples=cases(12, 200))
@given(
    policy=st.integers(0, len(POLICIES) - 1),
    prefetch=st.sampled_from([0, 1, 3]),
    actions=st.lists(st.sampled_from(["begin", "next", "older"]), max_size=30),
)
def test_of_several_iterations_only_the_latest_goes_on(
    data_dir: Path, policy: int, prefetch: int, actions: list[str]
) -> None:
    """Whatever is begun when, batches come once and in order; an iteration that is not the latest raises, or ends if it
    has handed out the last batch of its epoch.
    """
    loader = make_loader(data_dir, **POLICIES[policy], prefetch=prefetch)
    stale, handed = list[tuple[Iterator[PatientBatch], bool]](), list[list[str]]()
    latest: Iterator[PatientBatch] | None = None
    is_at_end = False
    for action in actions:
        if action == "begin" or latest is None:
            stale += [(latest, is_at_end)] if latest is not None else []
            latest = iter(loader)
        elif action == "older" and stale:
            before, (older, has_ended) = loader.state_dict(), stale.pop()
            with pytest.raises(StopIteration if has_ended else RuntimeError, match=r"^$|another iteration began"):
                next(older)
            assert loader.state_dict() == before
            continue
        batch = next(latest, None)
        is_at_end = loader.cursor == len(loader)
        if batch is None:
            latest = None
        else:
            handed.append(batch.patient_id)
    assert handed == twelve_epochs(data_dir, policy)[: len(handed)]
    for each in [*(older for older, _ in stale), *([latest] if latest is not None else [])]:
        each.close()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:This process")  # a process with threads is forked
@pytest.mark.parametrize("is_begun", [False, True])
def test_forked_workers_are_refused(data_dir: Path, is_begun: bool) -> None:
    loader = make_loader(data_dir)
    stream = iter(loader)
    if is_begun:
        next(stream)
    wrapped = DataLoader[Any](loader, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="give DataLoader num_workers=0"):
        next(iter(wrapped))
    assert loader.cursor == is_begun
    stream.close()


def test_a_loader_is_not_sent_to_workers_that_are_spawned(data_dir: Path) -> None:
    with pytest.raises(
        RuntimeError, match="cannot be copied or sent to another process: give DataLoader num_workers=0"
    ):
        pickle.dumps(make_loader(data_dir))


def continue_after_fork(arguments: Sequence[str]) -> int:
    """Continue an iteration of a ``DataLoader`` in a forked process; 0 = refused there, and whole here."""
    loader = make_loader(arguments[0], batch_size=2)
    stream = iter(DataLoader[Any](loader, batch_size=None))
    next(stream)
    if not (child := os.fork()):
        try:
            next(stream)
        except RuntimeError as error:
            os._exit(0 if "os.fork()" in str(error) else 3)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or int(len(list(stream)) != 26)


def test_an_iteration_of_a_data_loader_that_a_fork_took_along_raises(data_dir: Path) -> None:
    command = Command(continue_after_fork, data_dir)
    _, errors = command.communicate()
    assert command.returncode == 0, errors
