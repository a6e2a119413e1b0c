"""Whole training steps on a GPU: the launching thread never waits, and memory does not grow."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.steps import Precision, Stepper, endless_batches, new_model, num_codes
from benchmarks.synthetic import write_synthetic_data
from tests.gpu.device import DEVICE, gpu_test, on_gpu

WARM_UP_STEPS, CHECKED_STEPS = 3, 3
"""First steps may wait: libraries are loaded, and the optimiser makes its state."""


@gpu_test
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_launching_thread_never_waits(precision: Precision, checkpointing: bool, tmp_path: Path) -> None:
    data = write_synthetic_data(tmp_path / "data", num_patients=40, sets=12)
    stepper = Stepper(new_model("small", num_codes(data)), precision, device=DEVICE)
    stepper.model.gradient_checkpointing = checkpointing
    batches = endless_batches(data, 8, device=DEVICE)
    losses = [stepper.step(next(batches)) for _ in range(WARM_UP_STEPS)]
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # an operation that waits raises, with a traceback to its line
    try:
        losses += [stepper.step(batch) for batch in itertools.islice(batches, CHECKED_STEPS)]
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    assert all(loss.device.type == DEVICE for loss in losses)
    assert torch.stack(losses).isfinite().all()


@gpu_test
def test_memory_does_not_grow(tmp_path: Path) -> None:
    data = write_synthetic_data(tmp_path / "data", num_patients=40, sets=12)
    stepper = Stepper(new_model("small", num_codes(data)), "bf16", device=DEVICE)
    held = []
    for batch in itertools.islice(endless_batches(data, 8, device=DEVICE), 12):
        stepper.step(batch)
        stepper.state.optimizer.zero_grad(set_to_none=True)
        held.append(torch.cuda.memory_allocated() if on_gpu else 0)
    assert held[-1] <= 1.01 * held[3]
