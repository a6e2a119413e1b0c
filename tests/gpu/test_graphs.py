"""Steps that are replayed as CUDA graphs are the steps that are not."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.steps import Precision, Stepper, endless_batches, new_model, num_codes
from benchmarks.synthetic import write_synthetic_data
from model.capacity import BatchShape, fit_capacities
from tests.gpu.device import DEVICE, gpu_test, on_gpu
from training.graphs import StepGraphs

STEPS = 12


@gpu_test
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_are_the_steps(precision: Precision, tmp_path: Path) -> None:
    data = write_synthetic_data(tmp_path / "data", num_patients=40, sets=12)
    codes = num_codes(data)
    first = [ready.batch for ready in itertools.islice(endless_batches(data, 8), STEPS)]
    capacities = fit_capacities([BatchShape.of(batch) for batch in first], num_codes=codes)[-2:]
    losses = []
    for graphs in (StepGraphs(torch.device(DEVICE)) if on_gpu else None, None):
        stepper = Stepper(new_model("small", codes), precision, device=DEVICE, cuda_graphs=graphs is not None)
        stepper.settings = dataclasses.replace(stepper.settings, graphs=graphs)
        batches = endless_batches(data, 8, device=DEVICE, capacities=capacities)
        losses.append(torch.stack([stepper.step(batch).clone() for batch in itertools.islice(batches, STEPS)]))
        assert graphs is None or graphs.replayed >= STEPS // 2
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05 if precision == "bf16" else 1e-3, atol=0)
