"""Symmetric nearest-neighbour distances of ragged sets: one program takes one tile of slots of one set.

The maths is that of :func:`model.reconstruction.chamfer_sums`.  Products are in full float32.  A target has no
gradient: events are detached.

Shape suffixes: R slots, S sets, T tiles, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.ops import TILE
from model.kernels.tiles import load_tile, store_tile

NUM_DISTANCES = 3

GRADIENT_WARPS = 8
"""With the usual four, the gradient has too few registers."""


@triton.jit
def _measure(tile, MIN_SQUARE: tl.constexpr):
    square = tl.sum(tile * tile, 1)
    return square, tl.sqrt(tl.maximum(square, MIN_SQUARE))


@triton.jit
def _load_side(matrix, other_matrix, sides, rows, columns, row_mask, WIDTH: tl.constexpr):
    """Return a tile of ``matrix``, float32; of the other one, whose dtype may be another, where ``sides`` is 1."""
    tile = load_tile(matrix, rows, columns, WIDTH, row_mask & (sides == 0), WIDTH).to(tl.float32)
    return tile + load_tile(other_matrix, rows, columns, WIDTH, row_mask & (sides == 1), WIDTH).to(tl.float32)


@triton.jit
def _closer(distance, best, nearest, begin):
    """Return the smallest distances so far and their positions; of several at the same distance the first."""
    low, position = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
    return tl.minimum(low, best), tl.where(low < best, begin + position, nearest)


@triton.jit
def nearest_kernel(
    target, output, tile_set, tile_begin, slot_offsets, sizes, nearest, sums, num_slots,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, MIN_SQUARE: tl.constexpr,
):  # fmt: skip
    tile, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sides = tl.zeros([TILE], tl.int32) + side
    s, begin = tl.load(tile_set + tile), tl.load(tile_begin + tile)
    first, size = tl.load(slot_offsets + s), tl.load(sizes + s)
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    inside = begin + n < size
    own = _load_side(target, output, sides, first + begin + n, d, inside, WIDTH)
    square, norm = _measure(own, MIN_SQUARE)
    infinite = tl.full([TILE], float("inf"), tl.float32)
    zero = tl.zeros([TILE], tl.int64)
    by_direction, by_square, by_magnitude = infinite, infinite, infinite
    direction_at, square_at, magnitude_at = zero, zero, zero
    for other_begin in range(0, size, TILE):
        other_inside = (other_begin + n < size)[None, :]
        other = _load_side(output, target, sides, first + other_begin + n, d, other_begin + n < size, WIDTH)
        other_square, other_norm = _measure(other, MIN_SQUARE)
        product = tl.dot(own, tl.trans(other), input_precision="ieee")
        direction = tl.where(other_inside, 1 - product / (norm[:, None] * other_norm[None, :]), float("inf"))
        by_direction, direction_at = _closer(direction, by_direction, direction_at, other_begin)
        squared = tl.where(other_inside, square[:, None] + other_square[None, :] - 2 * product, float("inf"))
        by_square, square_at = _closer(squared, by_square, square_at, other_begin)
        magnitude = tl.where(other_inside, tl.abs(norm[:, None] - other_norm[None, :]), float("inf"))
        by_magnitude, magnitude_at = _closer(magnitude, by_magnitude, magnitude_at, other_begin)
    at = nearest + side * 3 * num_slots + first + begin + n
    tl.store(at, direction_at.to(tl.int32), mask=inside)
    tl.store(at + num_slots, square_at.to(tl.int32), mask=inside)
    tl.store(at + 2 * num_slots, magnitude_at.to(tl.int32), mask=inside)
    at = sums + (side * tl.num_programs(0) + tile) * 3
    tl.store(at, tl.sum(tl.where(inside, by_direction, 0.0)))
    tl.store(at + 1, tl.sum(tl.where(inside, by_magnitude, 0.0)))
    tl.store(at + 2, tl.sum(tl.where(inside, tl.maximum(by_square, 0.0), 0.0)))


@triton.jit
def _times_selected(nearest, num_slots, first, o, t, output_inside, target_inside):
    """Return [outputs, targets] float32: in how many of the two directions the pair is the nearest one."""
    of_target = tl.load(nearest + first + t, mask=target_inside, other=-1)
    of_output = tl.load(nearest + 3 * num_slots + first + o, mask=output_inside, other=-1)
    both = output_inside[:, None] & target_inside[None, :]
    selected = (of_target[None, :] == o[:, None]).to(tl.float32) + (of_output[:, None] == t[None, :]).to(tl.float32)
    return tl.where(both, selected, 0.0)


@triton.jit
def gradient_kernel(
    grad, target, output, tile_set, tile_begin, slot_offsets, sizes, nearest, grad_output, num_slots,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, MIN_SQUARE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    s, begin = tl.load(tile_set + tile), tl.load(tile_begin + tile)
    first, size = tl.load(slot_offsets + s), tl.load(sizes + s)
    kept = first + begin + tl.arange(0, TILE) < tl.load(slot_offsets + s + 1)
    by_direction, by_magnitude, by_square = tl.load(grad), tl.load(grad + 1), tl.load(grad + 2)
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    o, output_inside = begin + n, begin + n < size
    own = load_tile(output, first + o, d, WIDTH, output_inside, WIDTH).to(tl.float32)
    square, norm = _measure(own, MIN_SQUARE)
    has_norm = tl.where(square >= MIN_SQUARE, 1.0, 0.0)  # a clamped norm has no gradient
    own_factor, moved = tl.zeros([TILE], tl.float32), tl.zeros([TILE, BLOCK_D], tl.float32)
    for target_begin in range(0, size, TILE):
        t, target_inside = target_begin + n, target_begin + n < size
        other = load_tile(target, first + t, d, WIDTH, target_inside, WIDTH).to(tl.float32)
        other_square, other_norm = _measure(other, MIN_SQUARE)
        product = tl.dot(own, tl.trans(other), input_precision="ieee")
        direction = by_direction * _times_selected(nearest, num_slots, first, o, t, output_inside, target_inside)
        squared = by_square * _times_selected(nearest + num_slots, num_slots, first, o, t, output_inside, target_inside)
        squared = tl.where(square[:, None] + other_square[None, :] - 2 * product >= 0, squared, 0.0)
        magnitude = by_magnitude * _times_selected(
            nearest + 2 * num_slots, num_slots, first, o, t, output_inside, target_inside
        )
        gap = norm[:, None] - other_norm[None, :]
        sign = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
        norms = norm[:, None] * other_norm[None, :]
        factor = direction * product / (norms * (norm * norm)[:, None]) + magnitude * sign / norm[:, None]
        own_factor += tl.sum(tl.where(has_norm[:, None] > 0, factor, 0.0) + 2 * squared, 1)
        moved -= tl.dot(direction / norms + 2 * squared, other, input_precision="ieee")
    total = moved + own_factor[:, None] * own
    store_tile(grad_output, total, first + o, d, WIDTH, kept, WIDTH)


def chamfer(target: Tensor, output: Tensor, tiles: list[Tensor], min_norm: float) -> tuple[Tensor, Tensor]:
    """Return sums of direction, magnitude and squared distance, and the positions of the nearest within their sets.

    Args:
        target, output: [R, D].
        tiles: sets [T] and first positions [T] of the tiles, slot offsets [S+1] and numbers of events [S], int64.
        min_norm: norms are at least this.

    Returns:
        [3] float32; [6, R] int32, of targets by direction, square and magnitude, then of outputs; without the padding
        slots, which stay as they are.
    """
    num_tiles, (num_slots, width) = len(tiles[0]), target.shape
    nearest = torch.empty(2 * NUM_DISTANCES, num_slots, dtype=torch.int32, device=target.device)
    sums = torch.empty(2 * num_tiles, NUM_DISTANCES, device=target.device)
    if num_tiles:
        nearest_kernel[num_tiles, 2](
            target,
            output,
            *tiles,
            nearest,
            sums,
            num_slots,
            **_constants(width, min_norm),
        )
    return sums.sum(0), nearest


def chamfer_gradient(
    grad: Tensor, target: Tensor, output: Tensor, tiles: list[Tensor], nearest: Tensor, min_norm: float
) -> Tensor:
    """Return the gradient [R, D] of the outputs from that of the three sums; 0 for padding slots."""
    num_slots, width = target.shape
    grad_output = torch.empty_like(output)
    if len(tiles[0]):
        gradient_kernel[len(tiles[0]),](
            grad, target, output, *tiles, nearest, grad_output, num_slots,
            num_warps=GRADIENT_WARPS, **_constants(width, min_norm),
        )  # fmt: skip
    return grad_output


def _constants(width: int, min_norm: float) -> dict[str, float]:
    return {
        "WIDTH": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "TILE": TILE,
        "MIN_SQUARE": min_norm**2,
        "num_stages": 1,
    }
