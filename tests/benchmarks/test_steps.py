"""What the benchmarks measure is the model's own mathematics and the trainer's own step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.set_loop import loss_of_loop
from benchmarks.steps import Stepper, endless_batches, new_model, num_codes, outputs_and_gradients
from benchmarks.synthetic import invented, write_synthetic_data


def test_the_loop_over_sets_has_the_loss_and_gradient_of_the_batch() -> None:
    model, batch = new_model("small", 43).eval(), invented(3, 0, sets=5)
    expected = outputs_and_gradients(model, batch, noise=False)
    model.zero_grad(set_to_none=True)
    loss = loss_of_loop(model, batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["losses"]["total"], rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected["gradients"][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_learn(precision: str, tmp_path: Path) -> None:
    data = write_synthetic_data(tmp_path / "data", num_patients=20, sets=4)
    stepper = Stepper(new_model("small", num_codes(data)), precision)
    batch = next(endless_batches(data, 8, event_dropout=0.0))
    losses = [float(stepper.step(batch)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert stepper.state.progress.step == 8


def test_synthetic_data_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = (write_synthetic_data(tmp_path / name, num_patients=10, sets=4) for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
