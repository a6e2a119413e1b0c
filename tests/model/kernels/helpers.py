from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.ragged import SetLayout

CORNERS = [1, 15, 16, 17, 1, 9, 40, 3]
"""Sizes of sets around those of a tile."""


def layout_of(sizes: Sequence[int]) -> SetLayout:
    return SetLayout.build(torch.tensor([0, *sizes]).cumsum(0))


def by_set(x: Tensor, offsets: Tensor) -> list[Tensor]:
    """The rows of each set, padding slots included."""
    return list(x.split(offsets.diff().tolist()))


def check(found: Callable[[], Tensor], expected: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients agree within 1e-5 of the largest entry, for the same random gradient of the output."""
    results = []
    for compute in (found, expected):
        output = compute() + 0 * sum(x.sum() for x in inputs)  # an input that nothing came from has a gradient of 0
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        results.append([output.detach(), *torch.autograd.grad(output, inputs, grad)])
    for ours, reference in zip(*results, strict=True):
        largest = float(reference.abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5 * largest + 1e-12)
