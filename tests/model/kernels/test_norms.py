"""Norms of sums and rectifiers: outputs, gradients and sums over rows, at rows and widths around those of a tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import PostAttention
from model.kernels import norms, ops
from model.kernels.ops import choose_kernels
from tests.model.kernels.helpers import check

SHAPES = [(0, 16), (1, 5), (5, 37), (33, 64), (9, 256)]
EPS = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_near(found: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest + 1e-12)


@pytest.mark.parametrize("is_row", [True, False])
@pytest.mark.parametrize("has_more", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_of_a_sum(shape: tuple[int, int], has_more: bool, is_row: bool) -> None:
    x, gain, shift = random(*shape), random(shape[1], seed=1), random(shape[1], seed=2)
    y = random(shape[1], seed=3) if is_row else random(*shape, seed=3)
    total = x + y
    expected = F.layer_norm(total, shape[1:], gain, shift, EPS)
    with torch.no_grad():
        out, stats = ops.add_norm(x, y, gain, shift, EPS)
    assert_near(out, expected.detach())
    grad, more = random(*shape, seed=4).detach(), random(*shape, seed=5).detach() if has_more else None
    upper = grad if more is None else grad + more
    of_total, of_gain, of_shift = torch.autograd.grad(expected, (total, gain, shift), upper)
    with torch.no_grad():
        grad_sum, sums = ops.add_norm_gradients(grad, more, x, y, gain, stats)
    assert_near(grad_sum, of_total)
    for found, wanted in zip(sums, (of_gain, of_shift, of_total.sum(0)), strict=True):
        assert_near(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_a_rectifier(shape: tuple[int, int]) -> None:
    x, grad = random(*shape), random(*shape, seed=1).detach()
    hidden = x.relu()
    (expected,) = torch.autograd.grad(hidden, x, grad)
    found, total = ops.relu_gradient(grad, hidden.detach())
    assert torch.equal(found, expected)
    assert_near(total, expected.sum(0))


def test_programs_take_several_tiles_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more rows than there are programs; the last program has one row."""
    monkeypatch.setattr(norms, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(norms, "TILE_CELLS", 64)
    monkeypatch.setattr(norms, "COLUMNS", 16)
    for rows in (24, 25, 1):
        test_the_norm_of_a_sum((rows, 16), has_more=True, is_row=False)
        test_the_gradient_of_a_rectifier((rows, 20))


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_the_tail_of_an_attention(rows: int) -> None:
    torch.manual_seed(0)
    tail, attended, shift = PostAttention(24, 40), random(rows, 24), random(24, seed=1)
    for norm in (tail.norm_attention, tail.norm_output):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)

    def reference() -> Tensor:
        with choose_kernels(False):
            out: Tensor = tail(attended, shift)
            return out

    check(lambda: tail(attended, shift), reference, [attended, shift, *tail.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tail_in_half_precision(dtype: torch.dtype) -> None:
    """As under autocast: products in half precision, norms and what parameters get in float32."""
    torch.manual_seed(0)
    tail, attended = PostAttention(24, 40), random(40, 24)
    shift, half = random(24, seed=1), attended.detach().to(dtype).requires_grad_()
    results = []
    for x in (half, attended):
        out = tail(x, shift)
        assert out.dtype == torch.float32
        gradients = torch.autograd.grad(out.square().sum(), [x, shift, *tail.parameters()])
        assert gradients[0].dtype == x.dtype
        assert all(grad.dtype == torch.float32 for grad in gradients[1:])
        results.append([out.detach(), *(grad.float() for grad in gradients)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
