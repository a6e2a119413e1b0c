"""Memory of a step: the fit by hand, parts of a batch as a property, and what is measured."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile

from pipeline.loading.batch import PatientBatch
from pipeline.sampling.cost import CostModel
from pipeline.schema import UserError
from tests.model.helpers import random_batch
from training.memory import StepMemory, count_amounts, fit_peaks, free_bytes, halve, is_out_of_memory, measure_peak

CPU = torch.device("cpu")
SETS = [[1, 3], [2], [4, 1, 1], [5], [1, 1]]


def test_peak_is_the_most_held_at_any_moment() -> None:
    kept = []

    def step() -> None:
        for _ in range(3):
            kept[:] = [torch.empty(1000, dtype=torch.float32)]  # the next is there before this one goes

    assert measure_peak(step, CPU) == 8000


@pytest.mark.parametrize(("processes", "expected"), [(1, 1000), (2, 1000), (3, 550), (4, 550), (5, 400)])
def test_runs_that_share_a_gpu_share_its_memory(processes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (900, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100)
    assert free_bytes(torch.device("cuda", 1), processes) == expected


def test_processes_share_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.memory.usable_memory", lambda: 900)
    monkeypatch.setattr("training.memory.rss_bytes", lambda: 50)
    assert [free_bytes(CPU, processes) for processes in (1, 3)] == [950, 350]


def test_fit_finds_the_weights_of_which_peaks_are_made() -> None:
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.integers(1, 900, (12, 4)), np.ones(12)]).astype(float)
    cost = fit_peaks(rows, rows @ [3.0, 50.0, 0.5, 700.0, 9000.0])
    found = [cost.event, cost.set, cost.set_squared, cost.patient, cost.batch]
    assert found == pytest.approx([3.0, 50.0, 0.5, 700.0, 9000.0])


def test_fit_has_no_weight_below_nothing() -> None:
    rows = np.array([[1.0, 5, 25, 1, 1], [2, 3, 9, 1, 1], [3, 2, 4, 1, 1], [4, 1, 1, 1, 1]])
    cost = fit_peaks(rows, rows[:, 0] * 10 - rows[:, 1] + 4)
    assert min(cost.event, cost.set, cost.set_squared, cost.patient, cost.batch) >= 0


def test_amounts_are_those_that_the_plan_counts() -> None:
    batch, cost = random_batch(SETS), CostModel(event=2, set=3, set_squared=0.5, patient=7, batch=11)
    planned = cost.predict(batch.events_per_patient.numpy(), batch.sets_per_patient.numpy()).sum() + cost.batch
    weights = [cost.event, cost.set, cost.set_squared, cost.patient, cost.batch]
    assert np.dot(count_amounts(batch), weights) == pytest.approx(planned)


def same(one: PatientBatch, other: PatientBatch) -> bool:
    tensors = ("code", "value", "has_value", "set_offsets", "minute", "patient_offsets", "label")
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return equal and one.patient_id == other.patient_id


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=9), st.floats(1, 400))
def test_parts_are_the_batch_and_each_fits_or_is_one_patient(sets: list[list[int]], limit: float) -> None:
    batch = random_batch(sets)
    memory = StepMemory(peak=CostModel(batch=5), step_bytes=limit + 5, batch_bytes=1, batch_size=1)
    parts = memory.split(batch)
    assert [name for part in parts for name in part.patient_id] == batch.patient_id
    assert torch.equal(torch.cat([part.code for part in parts]), batch.code)
    start = 0
    for part in parts:
        assert same(part, batch.between(start, start := start + part.num_patients))
        cost = memory.peak.predict(part.events_per_patient.numpy(), part.sets_per_patient.numpy()).sum()
        assert cost <= limit * (1 + 1e-9) or part.num_patients == 1


def test_halves_by_hand() -> None:
    batch = random_batch(SETS)
    once = halve(batch)
    assert [part.num_patients for part in once] == [3, 2]
    twice = [half for part in once for half in halve(part)]
    assert [part.num_patients for part in twice] == [2, 1, 1, 1]
    assert same(twice[3], batch.between(4, 5))
    assert len(halve(twice[3])) == 1


def test_saved_is_loaded_and_damage_is_named(tmp_path: Path) -> None:
    memory = StepMemory(peak=CostModel(event=1.5), step_bytes=1e9, batch_bytes=2e9, batch_size=32)
    memory.save(path := tmp_path / "run" / "memory_model.json")
    assert StepMemory.load(path) == memory
    path.write_text('{"peak": {"events": 1}}')
    with pytest.raises(UserError, match=r"memory_model\.json"):
        StepMemory.load(path)


def test_what_a_measurement_recorded_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[profile]] = []

    def noted(**options: Any) -> profile:
        recorded = profile(**options)
        made.append(weakref.ref(recorded))
        return recorded

    monkeypatch.setattr("training.memory.profile", noted)
    assert measure_peak(lambda: torch.randn(99).sum(), torch.device("cpu")) >= 4 * 99
    assert [ref() for ref in made] == [None]


def test_no_memory_is_told_from_other_failures() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 60)
    assert is_out_of_memory(failure.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "torch/distributed"))
    assert is_out_of_memory(ImportError(f"x.so: failed to map segment: {os.strerror(errno.ENOMEM)}"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
