"""Causal attention over the sets of each patient, whose rows follow one another in one flat array.

One program takes one head of one tile of rows of one patient: forward with the rows before it (Dao 2023,
arXiv:2307.08691), backward with those before it for its queries and those after it for its keys and values.

Shape suffixes: S sets, T tiles, H heads, K width of a head.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.ops import SEQUENCE_TILE
from model.kernels.tiles import load_tile, store_tile

WIDE = 128
"""Width of a head from which on a program in float32 has to be shared out among twice as many warps."""


@triton.jit
def _scores(query, key, rows, columns, end, scale):
    """Return the scores [rows, columns], -inf where a row would see a later one or one of another patient."""
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    return tl.where((columns[None, :] <= rows[:, None]) & (columns < end)[None, :], score, float("-inf"))


@triton.jit
def _tile_bounds(tile_patient, tile_begin, offsets, tile, TILE: tl.constexpr):
    """Return the first row of the tile's patient, the tile's first position, and the row after the patient's last."""
    patient, begin = tl.load(tile_patient + tile), tl.load(tile_begin + tile) + tl.program_id(2) * TILE
    return tl.load(offsets + patient), begin, tl.load(offsets + patient + 1)


@triton.jit
def causal_forward(
    qkv, tile_patient, tile_begin, offsets, out, log_sums, scale,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, begin, end = _tile_bounds(tile_patient, tile_begin, offsets, tile, TILE)
    n, d = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    rows = first + begin + n
    own = qkv + head * K
    query = load_tile(own, rows, d, 3 * H * K, rows < end, K)
    top, norm = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
    pooled = tl.zeros([TILE, BLOCK_K], tl.float32)
    for at in range(0, begin + TILE, TILE):
        columns = first + at + n
        key = load_tile(own + H * K, columns, d, 3 * H * K, columns < end, K)
        value = load_tile(own + 2 * H * K, columns, d, 3 * H * K, columns < end, K)
        score = _scores(query, key, rows, columns, end, scale)
        new_top = tl.maximum(top, tl.max(score, 1))
        shrink, weight = tl.exp(top - new_top), tl.exp(score - new_top[:, None])
        pooled = pooled * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        norm, top = norm * shrink + tl.sum(weight, 1), new_top
    store_tile(out + head * K, pooled / norm[:, None], rows, d, H * K, rows < end, K)
    tl.store(log_sums + rows * H + head, top + tl.log(norm), mask=rows < end)


@triton.jit
def _grad_scores(query, key, value, grad, out, log_sum, rows, columns, end, scale):
    """Return the weights and the gradients of the scores, both [rows, columns] float32."""
    inside = (rows < end)[:, None]
    weight = tl.where(inside, tl.exp(_scores(query, key, rows, columns, end, scale) - log_sum[:, None]), 0.0)
    mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    return weight, weight * (tl.dot(grad, tl.trans(value), input_precision="ieee") - mean[:, None]) * scale


@triton.jit
def causal_backward(
    grad_out, qkv, tile_patient, tile_begin, offsets, out, log_sums, grad_qkv, scale,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, begin, end = _tile_bounds(tile_patient, tile_begin, offsets, tile, TILE)
    n, d = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    rows = first + begin + n
    inside, own, stride = rows < end, qkv + head * K, 3 * H * K
    query, key = load_tile(own, rows, d, stride, inside, K), load_tile(own + H * K, rows, d, stride, inside, K)
    value = load_tile(own + 2 * H * K, rows, d, stride, inside, K)
    grad = load_tile(grad_out + head * K, rows, d, H * K, inside, K)
    pooled = load_tile(out + head * K, rows, d, H * K, inside, K)
    log_sum = tl.load(log_sums + rows * H + head, mask=inside, other=0.0)
    grad_query = tl.zeros([TILE, BLOCK_K], tl.float32)
    for at in range(0, begin + TILE, TILE):
        columns = first + at + n
        other_key = load_tile(own + H * K, columns, d, stride, columns < end, K)
        other_value = load_tile(own + 2 * H * K, columns, d, stride, columns < end, K)
        _, grad_score = _grad_scores(query, other_key, other_value, grad, pooled, log_sum, rows, columns, end, scale)
        grad_query += tl.dot(grad_score.to(key.dtype), other_key, input_precision="ieee")
    store_tile(grad_qkv + head * K, grad_query, rows, d, stride, inside, K)
    grad_key, grad_value = tl.zeros([TILE, BLOCK_K], tl.float32), tl.zeros([TILE, BLOCK_K], tl.float32)
    for at in range(begin, end - first, TILE):
        later = first + at + n
        other_query = load_tile(own, later, d, stride, later < end, K)
        other_grad = load_tile(grad_out + head * K, later, d, H * K, later < end, K)
        other_pooled = load_tile(out + head * K, later, d, H * K, later < end, K)
        other_log_sum = tl.load(log_sums + later * H + head, mask=later < end, other=0.0)
        weight, grad_score = _grad_scores(
            other_query, key, value, other_grad, other_pooled, other_log_sum, later, rows, end, scale
        )
        grad_key += tl.dot(tl.trans(grad_score.to(key.dtype)), other_query, input_precision="ieee")
        grad_value += tl.dot(tl.trans(weight.to(key.dtype)), other_grad, input_precision="ieee")
    store_tile(grad_qkv + (H + head) * K, grad_key, rows, d, stride, inside, K)
    store_tile(grad_qkv + (2 * H + head) * K, grad_value, rows, d, stride, inside, K)


def causal(qkv: Tensor, tile_patient: Tensor, tile_begin: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention of each set to those up to it of its patient, and the logarithms of the sums of its softmax.

    Args:
        qkv: [S, 3, H, K], queries, keys and values.
        tile_patient: [T] int64, the patient of each tile of ``SEQUENCE_TILE`` rows.
        tile_begin: [T] int64, its first position within the patient.
        offsets: [B+1] int64, the first set of each patient.

    Returns:
        [S, H, K] like the values; [S, H] float32.
    """
    num_sets, _, heads, width = qkv.shape
    out = qkv.new_empty(num_sets, heads, width)
    log_sums = qkv.new_empty(num_sets, heads, dtype=torch.float32)
    if len(tile_patient):
        constants = _constants(qkv)
        causal_forward[len(tile_patient), heads, SEQUENCE_TILE // constants["TILE"]](
            qkv, tile_patient, tile_begin, offsets, out, log_sums, 1 / math.sqrt(width), **constants
        )
    return out, log_sums


def causal_gradient(
    grad_out: Tensor,
    qkv: Tensor,
    tile_patient: Tensor,
    tile_begin: Tensor,
    offsets: Tensor,
    out: Tensor,
    log_sums: Tensor,
) -> Tensor:
    """Return the gradient [S, 3, H, K] of queries, keys and values."""
    grad, (_, _, heads, width) = torch.empty_like(qkv), qkv.shape
    if len(tile_patient):
        constants = _constants(qkv)
        causal_backward[len(tile_patient), heads, SEQUENCE_TILE // constants["TILE"]](
            grad_out, qkv, tile_patient, tile_begin, offsets, out, log_sums, grad, 1 / math.sqrt(width), **constants
        )
    return grad


def _constants(qkv: Tensor) -> dict[str, int]:
    """Return a kernel's constants; float32 has registers for half of a tile."""
    (_, _, heads, width), is_float = qkv.shape, qkv.dtype == torch.float32
    block = max(16, triton.next_power_of_2(width))
    tile = SEQUENCE_TILE // 2 if is_float else SEQUENCE_TILE
    warps = 8 if is_float and block >= WIDE else 4
    return {"H": heads, "K": width, "BLOCK_K": block, "TILE": tile, "num_stages": 1, "num_warps": warps}
