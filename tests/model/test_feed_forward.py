from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model import feed_forward
from model.feed_forward import FeedForward


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 30])
def test_pieces_give_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "PIECE_ROWS", 7)
    torch.manual_seed(0)
    block = FeedForward(4, 6)
    x = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(rows, 4)
    plain = block.contract(F.relu(block.expand(x)))
    torch.testing.assert_close(block(x), plain)
    inputs = (x, *block.parameters())
    expected = torch.autograd.grad((plain * weight).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((block(x) * weight).sum(), inputs), expected)


def test_pieces_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "PIECE_ROWS", 7)
    torch.manual_seed(0)
    block = FeedForward(4, 6)
    x = torch.randn(20, 4, requires_grad=True)
    inputs = (x, *block.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        plain = block.contract(F.relu(block.expand(x)))
        found = block(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0.05)
    expected = torch.autograd.grad(plain.float().sum(), inputs)
    for gradient, other in zip(torch.autograd.grad(found.float().sum(), inputs), expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, atol=0.1, rtol=0.1)
