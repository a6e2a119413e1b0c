"""Attention pooling of segments of rows: the events of a variable, the sets of a patient, the events of a set.

One program takes one head of one segment.  The maths is that of :func:`model.segments.attention_pool`; sums are in
float32.

Shape suffixes: N rows, G segments, H heads, D width of all heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.tiles import load_tile, rows_at, store_tile

ROWS = 16


@triton.jit
def pool_forward(
    values, scores, order, offsets, out, log_sums,
    H: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, end = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    d = tl.arange(0, BLOCK_D)
    top, norm = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    pooled = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(first, end, ROWS):
        row, inside = rows_at(order, begin, end, ROWS, HAS_ORDER)
        score = tl.load(scores + row * H + head, mask=inside, other=float("-inf")).to(tl.float32)
        value = load_tile(values + head * WIDTH, row, d, H * WIDTH, inside, WIDTH).to(tl.float32)
        new_top = tl.maximum(top, tl.max(score, 0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that are left out may come first
        shrink, weight = tl.exp(top - anchor), tl.exp(score - anchor)
        pooled = pooled * shrink + tl.sum(weight[:, None] * value, 0)
        norm, top = norm * shrink + tl.sum(weight, 0), new_top
    at = (segment * H + head) * WIDTH + d
    tl.store(out + at, pooled / norm, mask=d < WIDTH)
    tl.store(log_sums + segment * H + head, top + tl.log(norm))


@triton.jit
def pool_backward(
    grad_out, values, scores, order, offsets, out, log_sums, grad_values, grad_scores,
    H: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, end = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    d = tl.arange(0, BLOCK_D)
    at = (segment * H + head) * WIDTH + d
    grad = tl.load(grad_out + at, mask=d < WIDTH, other=0.0).to(tl.float32)
    mean = tl.sum(grad * tl.load(out + at, mask=d < WIDTH, other=0.0), 0)
    log_sum = tl.load(log_sums + segment * H + head)
    for begin in range(first, end, ROWS):
        row, inside = rows_at(order, begin, end, ROWS, HAS_ORDER)
        score = tl.load(scores + row * H + head, mask=inside, other=float("-inf")).to(tl.float32)
        value = load_tile(values + head * WIDTH, row, d, H * WIDTH, inside, WIDTH).to(tl.float32)
        weight = tl.exp(score - log_sum)
        grad_score = weight * (tl.sum(value * grad[None, :], 1) - mean)
        tl.store(grad_scores + row * H + head, grad_score.to(grad_scores.dtype.element_ty), mask=inside)
        store_tile(grad_values + head * WIDTH, weight[:, None] * grad[None, :], row, d, H * WIDTH, inside, WIDTH)


def pool(values: Tensor, scores: Tensor, order: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the values of each segment, weighted by the softmax of its scores, and the softmax's log sums.

    Args:
        values: [N, D].
        scores: [N, H]; a head pools a D/H-th of the channels, and -inf leaves a row out.
        order: [N] int64, the rows by segment; None where they come so.
        offsets: [G+1] int64, the first place of each segment, all of which have a row that is not left out.

    Returns:
        [G, D] float32; [G, H] float32.
    """
    heads, num_segments = scores.shape[1], len(offsets) - 1
    out = torch.empty(num_segments, values.shape[1], dtype=torch.float32, device=values.device)
    log_sums = torch.empty(num_segments, heads, dtype=torch.float32, device=values.device)
    if num_segments:
        pool_forward[num_segments, heads](
            values, scores, order, offsets, out, log_sums, **_constants(values, heads, order)
        )
    return out, log_sums


def pool_gradients(
    grad_out: Tensor,
    values: Tensor,
    scores: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of values and scores of :func:`pool`."""
    heads, num_segments = scores.shape[1], len(offsets) - 1
    grads = torch.empty_like(values), torch.empty_like(scores)
    if num_segments:
        pool_backward[num_segments, heads](
            grad_out, values, scores, order, offsets, out, log_sums, *grads, **_constants(values, heads, order)
        )
    return grads


def _constants(values: Tensor, heads: int, order: Tensor | None) -> dict[str, int]:
    width = values.shape[1] // heads
    blocks = {"BLOCK_D": triton.next_power_of_2(width), "ROWS": ROWS}
    return {"H": heads, "WIDTH": width, **blocks, "HAS_ORDER": order is not None}
