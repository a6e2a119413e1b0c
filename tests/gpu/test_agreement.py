"""What a GPU computes is what the CPU computes, in every precision, with and without gradient checkpointing.

Each test records the deviations that it found, so that a run on a new card gives figures as well as a verdict.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.steps import Precision, Preset, new_model, outputs_and_gradients
from benchmarks.synthetic import invented
from tests.gpu.device import DEVICE, gpu_test, on_gpu

Results = dict[str, dict[str, Tensor]]
Record = Callable[[str, object], None]

NUM_CODES = 43
PATIENTS: dict[Preset, int] = {"small": 8, "reference": 2}


def deviations(found: Results, expected: Results) -> dict[str, float]:
    """Return the largest relative deviation of the outputs and of the losses, and that of the whole gradient."""
    assert {kind: set(group) for kind, group in found.items()} == {kind: set(e) for kind, e in expected.items()}
    largest = {
        kind: max(relative(found[kind][name], expected[kind][name]) for name in expected[kind])
        for kind in ("outputs", "losses")
    }
    whole = [torch.cat([group["gradients"][name].flatten() for name in sorted(group["gradients"])])
             for group in (found, expected)]  # fmt: skip
    return {**largest, "gradient": relative(*whole)}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@gpu_test
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("preset", ["small", "reference"])
def test_float32_agrees_with_the_cpu(preset: Preset, noise: bool, record_property: Record) -> None:
    model, batch = new_model(preset, NUM_CODES), invented(PATIENTS[preset], 0)
    expected = outputs_and_gradients(model, batch, noise=noise)
    found = deviations(outputs_and_gradients(model, batch, device=DEVICE, noise=noise), expected)
    for name, deviation in found.items():
        record_property(name, deviation)
    assert found["outputs"] < 2e-5
    assert found["losses"] < 2e-5
    # Where two neighbours are equally near, the last bit decides to which of them a distance's gradient goes.
    assert found["gradient"] < 5e-4


@gpu_test
@pytest.mark.parametrize(("precision", "loss", "gradient"), [("bf16", 0.01, 0.2), ("fp16", 0.001, 0.03)])
@pytest.mark.parametrize("preset", ["small", "reference"])
def test_mixed_precision_is_near_float32_on_the_cpu(
    preset: Preset, precision: Precision, loss: float, gradient: float, record_property: Record
) -> None:
    """The bounds are those of docs/model.md."""
    model, batch = new_model(preset, NUM_CODES), invented(PATIENTS[preset], 0)
    expected = outputs_and_gradients(model, batch)
    found = deviations(outputs_and_gradients(model, batch, device=DEVICE, precision=precision), expected)
    for name, deviation in found.items():
        record_property(name, deviation)
    assert 0 < found["losses"] < loss
    assert 0 < found["gradient"] < gradient


@gpu_test
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_nothing_and_saves_memory(precision: Precision, record_property: Record) -> None:
    model, batch, peaks, results = new_model("small", NUM_CODES), invented(8, 0), [], []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        results.append(outputs_and_gradients(model, batch, device=DEVICE, precision=precision))
        peaks.append(torch.cuda.max_memory_allocated() if on_gpu else 0)
    found = deviations(results[1], results[0])
    for name, deviation in found.items():
        record_property(name, deviation)
    record_property("peak_bytes", peaks)
    # Atomic additions on a GPU come in any order, so that equal passes differ in their last bits.
    assert max(found.values()) < (1e-5 if precision == "fp32" else 1e-2)
    if on_gpu:
        assert peaks[1] < 0.8 * peaks[0]
    else:
        assert max(found.values()) == 0
