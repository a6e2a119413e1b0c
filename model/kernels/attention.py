"""The two attentions of an ISAB over the slots of ragged sets, forward and backward, without padding to size classes.

One program takes one set: its events in tiles of ``TILE`` slots, its inducing rows in one.  Sums are in float32,
whatever the inputs are in.  No program adds to what another one writes, so results are the same at every call.

Shape suffixes: R slots, S sets, H heads, M inducing points, I inducing rows of all sets, D width.  A set has M inducing
rows, or one that stands for M equal ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.ops import TILE
from model.kernels.tiles import load_tile, store_tile

MAX_COLUMNS = 128
"""Most channels of a program that gathers; wider values are shared out among programs."""

BACKWARD_CHANNELS = 64
"""Most channels that a program takes at a time for the gradient; with more, float32 has not enough registers."""


@triton.jit
def _set_bounds(slot_offsets, sizes, num_single, s, M: tl.constexpr):
    """Return a set's first slot, numbers of slots and of events, first inducing row and number of these."""
    first, single = tl.load(slot_offsets + s), tl.load(num_single)
    row = tl.where(s < single, s, single + (s - single) * M)
    return first, tl.load(slot_offsets + s + 1) - first, tl.load(sizes + s), row, tl.where(s < single, 1, M)


@triton.jit
def _scores_of(scores, slots, inside, stride, scale, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the scores [BLOCK_M, TILE] of a head, -inf for slots outside of the set."""
    m = tl.arange(0, BLOCK_M)
    mask = inside[None, :] & (m < M)[:, None]
    score = tl.load(scores + slots[None, :] * stride + m[:, None], mask=mask, other=0.0).to(tl.float32) * scale
    return tl.where(inside[None, :], score, float("-inf"))


@triton.jit
def gather_forward(
    projected, slot_offsets, sizes, num_single, out, log_sums, scale,
    H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    first, _, size, row, rows = _set_bounds(slot_offsets, sizes, num_single, s, M)
    m, d = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total, stride = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), H * (WIDTH + M)
    for head in tl.static_range(H):
        values, scores = projected + head * WIDTH, projected + H * WIDTH + head * M
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        pooled = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for begin in range(0, size, TILE):
            inside = begin + tl.arange(0, TILE) < size
            slots = first + begin + tl.arange(0, TILE)
            score = _scores_of(scores, slots, inside, stride, scale, M, BLOCK_M)
            new_top = tl.maximum(top, tl.max(score, 1))
            shrink, weight = tl.exp(top - new_top), tl.exp(score - new_top[:, None])
            value = load_tile(values, slots, d, stride, inside, WIDTH)
            pooled = pooled * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            norm, top = norm * shrink + tl.sum(weight, 1), new_top
        total += pooled / norm[:, None]
        tl.store(log_sums + (s * H + head) * M + m, top + tl.log(norm), mask=m < M)
    store_tile(out, total, row + m, d, WIDTH, m < rows, WIDTH)


@triton.jit
def _grad_weights(
    grad_out, values, row, rows, slots, inside, stride,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the gradients [BLOCK_M, TILE] of the weights of a head, from a few channels at a time."""
    m, total = tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M, TILE], tl.float32)
    for channel in range(0, WIDTH, BLOCK_D):
        d = channel + tl.arange(0, BLOCK_D)
        grad = load_tile(grad_out, row + m, d, WIDTH, m < rows, WIDTH)
        value = load_tile(values, slots, d, stride, inside, WIDTH)
        total += tl.dot(grad, tl.trans(value), input_precision="ieee")
    return total


@triton.jit
def gather_backward(
    grad_out, projected, slot_offsets, sizes, num_single, log_sums, grad_projected, scale,
    H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, num_slots, size, row, rows = _set_bounds(slot_offsets, sizes, num_single, s, M)
    m, n, stride = tl.arange(0, BLOCK_M), tl.arange(0, TILE), H * (WIDTH + M)
    values, scores = projected + head * WIDTH, projected + H * WIDTH + head * M
    log_sum = tl.load(log_sums + (s * H + head) * M + m, mask=m < M, other=0.0)
    mean = tl.zeros([BLOCK_M], tl.float32)  # of the gradients of the weights
    for begin in range(0, size, TILE):
        slots, inside = first + begin + n, begin + n < size
        weight = tl.exp(_scores_of(scores, slots, inside, stride, scale, M, BLOCK_M) - log_sum[:, None])
        grad_weight = _grad_weights(grad_out, values, row, rows, slots, inside, stride, WIDTH, BLOCK_M, BLOCK_D, TILE)
        mean += tl.sum(weight * grad_weight, 1)
    for begin in range(0, num_slots, TILE):
        slots, inside, kept = first + begin + n, begin + n < size, begin + n < num_slots
        weight = tl.exp(_scores_of(scores, slots, inside, stride, scale, M, BLOCK_M) - log_sum[:, None])
        grad_weight = _grad_weights(grad_out, values, row, rows, slots, inside, stride, WIDTH, BLOCK_M, BLOCK_D, TILE)
        grad_score = weight * (grad_weight - mean[:, None]) * scale
        store_tile(grad_projected + H * WIDTH + head * M, tl.trans(grad_score), slots, m, stride, kept, M)
        for channel in range(0, WIDTH, BLOCK_D):
            d = channel + tl.arange(0, BLOCK_D)
            grad = load_tile(grad_out, row + m, d, WIDTH, m < rows, WIDTH)
            grad_value = tl.dot(tl.trans(weight.to(grad.dtype)), grad, input_precision="ieee")
            store_tile(grad_projected + head * WIDTH, grad_value, slots, d, stride, kept, WIDTH)


@triton.jit
def _weights_of_queries(query, keys, rows, scale, BLOCK_M: tl.constexpr):
    """Return softmax over the rows of a set, [TILE, BLOCK_M] float32."""
    score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    score = tl.where((tl.arange(0, BLOCK_M) < rows)[None, :], score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def scatter_forward(
    queries, keys, slot_offsets, sizes, num_single, out, scale,
    H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, num_slots, _, row, rows = _set_bounds(slot_offsets, sizes, num_single, s, M)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    key = load_tile(keys, row + m, d, WIDTH, m < rows, WIDTH).to(queries.dtype.element_ty)
    for begin in range(0, num_slots, TILE):
        slots, inside = first + begin + tl.arange(0, TILE), begin + tl.arange(0, TILE) < num_slots
        query = load_tile(queries + head * WIDTH, slots, d, H * WIDTH, inside, WIDTH)
        weight = _weights_of_queries(query, key, rows, scale, BLOCK_M)
        pooled = tl.dot(weight.to(key.dtype), key, input_precision="ieee")
        store_tile(out + head * WIDTH, pooled, slots, d, H * WIDTH, inside, WIDTH)


@triton.jit
def scatter_backward(
    grad_out, queries, keys, slot_offsets, sizes, num_single, grad_queries, grad_keys, scale,
    H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    first, num_slots, _, row, rows = _set_bounds(slot_offsets, sizes, num_single, s, M)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    key = load_tile(keys, row + m, d, WIDTH, m < rows, WIDTH).to(queries.dtype.element_ty)
    grad_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for head in range(H):
        for begin in range(0, num_slots, TILE):
            slots, inside = first + begin + tl.arange(0, TILE), begin + tl.arange(0, TILE) < num_slots
            query = load_tile(queries + head * WIDTH, slots, d, H * WIDTH, inside, WIDTH)
            grad = load_tile(grad_out + head * WIDTH, slots, d, H * WIDTH, inside, WIDTH)
            weight = _weights_of_queries(query, key, rows, scale, BLOCK_M)
            grad_weight = tl.dot(grad, tl.trans(key), input_precision="ieee")
            mean = tl.sum(weight * grad_weight, 1)
            grad_score = (weight * (grad_weight - mean[:, None]) * scale).to(key.dtype)
            grad_query = tl.dot(grad_score, key, input_precision="ieee")
            store_tile(grad_queries + head * WIDTH, grad_query, slots, d, H * WIDTH, inside, WIDTH)
            grad_key += tl.dot(tl.trans(grad_score), query, input_precision="ieee")
            grad_key += tl.dot(tl.trans(weight.to(key.dtype)), grad, input_precision="ieee")
    store_tile(grad_keys, grad_key, row + m, d, WIDTH, m < rows, WIDTH)


def gather(
    projected: Tensor, sets: list[Tensor], heads: int, points: int, num_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what the inducing points of each set gather, and the logarithms of the sums of their softmax.

    Args:
        projected: [R, H·D + H·M], the values of each slot, then its scores by each point before they are scaled.
        sets: slot offsets [S+1], numbers of events [S] and the number of sets of one slot [1], which come first, int64.
        heads, points, num_rows: H, M and I.
        scale: factor of the scores.

    Returns:
        [I, D] like the values, the sum over heads; [S, H, M] float32.
    """
    constants = _constants(heads, points, projected.shape[1] // heads - points)
    out = projected.new_empty(num_rows, constants["WIDTH"])
    log_sums = projected.new_empty(len(sets[1]), heads, points, dtype=torch.float32)
    if len(sets[1]):
        constants["BLOCK_D"] = min(constants["BLOCK_D"], MAX_COLUMNS)
        gather_forward[len(sets[1]), triton.cdiv(constants["WIDTH"], constants["BLOCK_D"])](
            projected, *sets, out, log_sums, scale, **constants
        )
    return out, log_sums


def gather_gradient(
    grad_out: Tensor, projected: Tensor, sets: list[Tensor], log_sums: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of what :func:`gather` is given; that of padding slots is 0."""
    grad, (_, heads, points) = torch.empty_like(projected), log_sums.shape
    if len(sets[1]):
        constants = _constants(heads, points, grad_out.shape[1])
        constants["BLOCK_D"] = min(constants["BLOCK_D"], BACKWARD_CHANNELS)
        gather_backward[len(sets[1]), heads](grad_out, projected, *sets, log_sums, grad, scale, **constants)
    return grad


def scatter(
    queries: Tensor, keys: Tensor, sets: list[Tensor], heads: int, points: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Return [R, H·D]: the queries [R, H·D] of each set attend to its inducing rows, of ``keys`` [I, D]."""
    out = torch.empty_like(queries)
    if len(sets[1]):
        scatter_forward[len(sets[1]), heads](
            queries, keys, *sets, out, scale, **_constants(heads, points, keys.shape[1])
        )
    return out


def scatter_gradients(
    grad_out: Tensor, queries: Tensor, keys: Tensor, sets: list[Tensor],
    heads: int, points: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries and keys of :func:`scatter`."""
    grads = torch.empty_like(queries), torch.empty_like(keys)
    if len(sets[1]):
        scatter_backward[len(sets[1]),](
            grad_out, queries, keys, *sets, *grads, scale,
            **_constants(heads, points, keys.shape[1]),
        )  # fmt: skip
    return grads


def _constants(heads: int, points: int, width: int) -> dict[str, int]:
    """Return a kernel's constants.  Most sets have a tile or two, for which loads in advance would only cost memory."""
    blocks = {"BLOCK_M": max(TILE, triton.next_power_of_2(points)), "BLOCK_D": max(TILE, triton.next_power_of_2(width))}
    return {"H": heads, "M": points, "WIDTH": width, **blocks, "TILE": TILE, "num_stages": 1}
