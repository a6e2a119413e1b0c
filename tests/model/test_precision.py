"""Mixed precision: how near it is, and what stays in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.precision import compare
from benchmarks.steps import Precision, prepare
from model.losses import LossOptions, compute_losses
from tests.model.helpers import counts_of, random_batch, run_model, tiny_model

SETS = [[1, 3, 2, 1, 9], [5], [2, 2, 12, 1, 1, 1, 4], [1], [11, 3]]


@pytest.mark.parametrize(("precision", "loss", "gradient"), [("bf16", 0.01, 0.2), ("fp16", 0.001, 0.03)])
def test_losses_and_gradients_are_near_those_of_float32(precision: Precision, loss: float, gradient: float) -> None:
    """docs/model.md states the bounds."""
    batches = [prepare(random_batch(SETS, seed=seed), seed) for seed in range(4)]
    found: Any = compare(tiny_model(), precision, batches, warmup_steps=0)
    for name in ("total", "reconstruction", "kl", "outcome"):
        assert 0 < found[name]["largest"] < loss, name
    assert 0 < found["free_total"]["largest"] < 3 * loss  # on weights of its own, from which deviations are carried on
    assert 0 < found["gradient"]["largest"] < gradient


class Seen(TorchDispatchMode):
    """Notes the dtypes of the floating tensors that go in and come out of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, set[torch.dtype]] = {}
        self.outputs: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        for seen, values in ((self.inputs, args), (self.outputs, (out,))):
            for value in torch.utils._pytree.tree_leaves(values):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    seen.setdefault(name, set()).add(value.dtype)
        return out


FLOAT32_INPUTS = (
    "exp", "log", "sqrt", "_log_softmax", "nll_loss_forward", "index_add", "min", "clamp_min", "clamp", "asinh", "sin",
)  # fmt: skip
"""Of KL divergence, posterior, losses, softmax over sets and variables, distances, time encoding and events."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_sums_and_exponentiates_stays_in_float32(dtype: torch.dtype) -> None:
    model, batch = tiny_model(), random_batch(SETS)
    with Seen() as seen, torch.autocast("cpu", dtype):
        output = run_model(model, batch, seed=0)
        found = compute_losses(output, batch.label, LossOptions(), counts_of(batch), beta=0.1)
    assert all(dtype in seen.inputs[name] for name in ("mm", "addmm", "bmm")), "or nothing was rough at all"
    for name in FLOAT32_INPUTS:
        assert seen.inputs[name] == {torch.float32}, name
    assert seen.outputs["_softmax"] == {torch.float32}
    values = [found.total, found.reconstruction, found.kl, found.outcome, output.context]
    values += [*output.posterior]
    assert {value.dtype for value in values} == {torch.float32}
    found.total.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
