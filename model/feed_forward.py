"""The feed-forward of a MAB, in pieces that stay in a CPU's cache.

Nearly all of the model's arithmetic is this feed-forward over the inducing rows.  Its hidden rows are the largest
tensor there is (18,000 × 512 in a batch of 16 ICU stays).  Written out whole, forward and backward, matrix products
wait for fresh pages of memory: 115 GFLOP/s where the same two cores reach 164 in pieces of 2,048 rows
(benchmarks/feed_forward.py). A GPU gains nothing from pieces and runs the plain form; both give the same sums, in
another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE_ROWS = 2048
"""Rows a piece: 4 MiB of float32 hidden rows at the reference width, 1/8 of a common last-level cache."""


class FeedForward(nn.Module):
    """``contract(relu(expand(x)))``, [R, width] -> [R, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_exporting() or x.shape[0] <= PIECE_ROWS:
            return self.contract(F.relu(self.expand(x)))
        arguments: tuple[Tensor, ...] = (
            x,
            self.expand.weight,
            self.expand.bias,
            self.contract.weight,
            self.contract.bias,
        )
        if torch.is_autocast_enabled("cpu"):  # inside a Function autocast does not reach
            arguments = tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in arguments)
        return _InPieces.apply(*arguments)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = x.new_empty(x.shape[0], w1.shape[0])
        out = x.new_empty(x.shape[0], w2.shape[0])
        for x_piece, hidden_piece, out_piece in _pieces(x, hidden, out):
            torch.addmm(b1, x_piece, w1.t(), out=hidden_piece)
            hidden_piece.relu_()
            torch.addmm(b2, hidden_piece, w2.t(), out=out_piece)
        ctx.save_for_backward(x, hidden, w1, w2)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        x, hidden, w1, w2 = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_x = torch.empty_like(x)
        # Sums over pieces are kept in float32, whatever the pieces are in.
        grad_w1, grad_w2 = torch.zeros_like(w1, dtype=torch.float32), torch.zeros_like(w2, dtype=torch.float32)
        grad_b1 = torch.zeros(w1.shape[0])
        buffer = hidden.new_empty(PIECE_ROWS, hidden.shape[1])
        for x_piece, hidden_piece, out_piece, grad_piece in _pieces(x, hidden, grad_out, grad_x):
            grad_hidden = buffer[: x_piece.shape[0]]
            torch.mm(out_piece, w2, out=grad_hidden)
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden_piece, 0, grad_input=grad_hidden)
            torch.mm(grad_hidden, w1, out=grad_piece)
            grad_b1 += grad_hidden.sum(0, dtype=torch.float32)
            _add_product(grad_w1, grad_hidden.t(), x_piece)
            _add_product(grad_w2, out_piece.t(), hidden_piece)
        grad_b2 = grad_out.sum(0, dtype=torch.float32)
        return grad_x, grad_w1.to(w1.dtype), grad_b1.to(w1.dtype), grad_w2.to(w2.dtype), grad_b2.to(w2.dtype)


def _pieces(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(tensor.split(PIECE_ROWS) for tensor in tensors), strict=True)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
