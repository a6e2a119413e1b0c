"""Layer norm of a sum, its gradient, and that of a rectifier, each with the sums over rows that parameters need.

A program takes some rows whole; sums over all rows are made of one partial sum a program, added up in a fixed order.

Shape suffixes: R rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.tiles import load_tile, store_tile

TILE_CELLS = 2048
"""Cells of a tile of rows: 16 registers a thread for each of the tiles of a gradient."""

MAX_PROGRAMS = 256
"""Most partial sums; each program takes as many rows as that leaves."""

COLUMNS = 128


@triton.jit
def _load_sum(x, y, rows, columns, inside, WIDTH: tl.constexpr, IS_ROW: tl.constexpr):
    """Return the tile of ``x + y`` in float32, 0 outside; ``y`` has the shape of x, or is one row for all."""
    total = load_tile(x, rows, columns, WIDTH, inside, WIDTH).to(tl.float32)
    if IS_ROW:
        return total + tl.load(y + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    return total + load_tile(y, rows, columns, WIDTH, inside, WIDTH).to(tl.float32)


@triton.jit
def norm_forward(
    x, y, gain, shift, out, stats, num_rows, eps,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, IS_ROW: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, inside = tl.arange(0, BLOCK_D), rows < num_rows
    total = _load_sum(x, y, rows, columns, inside, WIDTH, IS_ROW)
    mean = tl.sum(total, 1) / WIDTH
    centred = tl.where((columns < WIDTH)[None, :], total - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    factor = tl.load(gain + columns, mask=columns < WIDTH, other=0.0)
    offset = tl.load(shift + columns, mask=columns < WIDTH, other=0.0)
    normed = centred * scale[:, None] * factor[None, :] + offset[None, :]
    store_tile(out, normed, rows, columns, WIDTH, inside, WIDTH)
    tl.store(stats + rows, mean, mask=inside)
    tl.store(stats + num_rows + rows, scale, mask=inside)


@triton.jit
def norm_backward(
    grad, more, x, y, gain, stats, grad_sum, sums, num_rows, rows_each,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, IS_ROW: tl.constexpr, HAS_MORE: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * rows_each
    columns = tl.arange(0, BLOCK_D)
    exists = columns < WIDTH
    factor = tl.load(gain + columns, mask=exists, other=0.0)
    of_gain, of_shift = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    of_sum = tl.zeros([BLOCK_D], tl.float32)
    for at in range(begin, tl.minimum(begin + rows_each, num_rows), ROWS):
        rows = at + tl.arange(0, ROWS)
        inside = rows < num_rows
        upper = load_tile(grad, rows, columns, WIDTH, inside, WIDTH).to(tl.float32)
        if HAS_MORE:
            upper += load_tile(more, rows, columns, WIDTH, inside, WIDTH).to(tl.float32)
        mean = tl.load(stats + rows, mask=inside, other=0.0)
        scale = tl.load(stats + num_rows + rows, mask=inside, other=0.0)
        total = _load_sum(x, y, rows, columns, inside, WIDTH, IS_ROW)
        unit = tl.where(exists[None, :], (total - mean[:, None]) * scale[:, None], 0.0)
        of_gain += tl.sum(upper * unit, 0)
        of_shift += tl.sum(upper, 0)
        upper *= factor[None, :]
        along, constant = tl.sum(upper * unit, 1) / WIDTH, tl.sum(upper, 1) / WIDTH
        lower = (upper - unit * along[:, None] - constant[:, None]) * scale[:, None]
        lower = tl.where(exists[None, :], lower, 0.0)
        of_sum += tl.sum(lower, 0)
        store_tile(grad_sum, lower, rows, columns, WIDTH, inside, WIDTH)
    own = sums + tl.program_id(0) * 3 * WIDTH + columns
    tl.store(own, of_gain, mask=exists)
    tl.store(own + WIDTH, of_shift, mask=exists)
    tl.store(own + 2 * WIDTH, of_sum, mask=exists)


@triton.jit
def relu_backward(
    grad, hidden, out, sums, num_rows, rows_each, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    begin = tl.program_id(0).to(tl.int64) * rows_each
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(begin, tl.minimum(begin + rows_each, num_rows), ROWS):
        rows = at + tl.arange(0, ROWS)
        inside = rows < num_rows
        is_on = load_tile(hidden, rows, columns, WIDTH, inside, WIDTH) > 0
        lower = tl.where(is_on, load_tile(grad, rows, columns, WIDTH, inside, WIDTH).to(tl.float32), 0.0)
        total += tl.sum(lower, 0)
        store_tile(out, lower, rows, columns, WIDTH, inside, WIDTH)
    tl.store(sums + tl.program_id(0) * WIDTH + columns, total, mask=columns < WIDTH)


def add_norm(x: Tensor, y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the layer norm [R, D] float32 of ``x + y``, and [2, R] float32, the mean and 1 ÷ deviation of each row.

    Args:
        x: [R, D].
        y: [R, D], or [D] for every row.
        gain, shift: [D] float32, of the norm.
        eps: of the norm.
    """
    num_rows, width = x.shape
    out = torch.empty(num_rows, width, dtype=torch.float32, device=x.device)
    stats = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        constants = _constants(width, y)
        grid = (triton.cdiv(num_rows, constants["ROWS"]),)
        norm_forward[grid](x, y, gain, shift, out, stats, num_rows, eps, **constants)
    return out, stats


def add_norm_gradients(
    grad: Tensor, more: Tensor | None, x: Tensor, y: Tensor, gain: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x + y``, like x, and [3, D] float32: those of gain and shift, and its sum over rows.

    Args:
        grad: [R, D], the gradient of the layer norm.
        more: [R, D], what is to be added to that; None = nothing.
        x, y, gain: what :func:`add_norm` was given.
        stats: what it returned.
    """
    num_rows, width = x.shape
    grad_sum, constants = torch.empty_like(x), _constants(width, y)
    programs, rows_each = _share_rows(num_rows, constants["ROWS"])
    sums = torch.empty(programs, 3, width, dtype=torch.float32, device=x.device)
    if programs:
        norm_backward[programs,](
            grad, more, x, y, gain, stats, grad_sum, sums, num_rows, rows_each, HAS_MORE=more is not None, **constants
        )
    return grad_sum, sums.sum(0)


def relu_gradient(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient [R, D] of what a rectifier was given, and its sum over rows [D] float32.

    Args:
        grad: [R, D], the gradient of the rectifier's output.
        hidden: [R, D], that output.
    """
    (num_rows, width), out, rows = hidden.shape, torch.empty_like(hidden), TILE_CELLS // COLUMNS
    programs, rows_each = _share_rows(num_rows, rows)
    sums = torch.empty(programs, width, dtype=torch.float32, device=hidden.device)
    if programs:
        grid = programs, triton.cdiv(width, COLUMNS)
        relu_backward[grid](grad, hidden, out, sums, num_rows, rows_each, WIDTH=width, COLUMNS=COLUMNS, ROWS=rows)
    return out, sums.sum(0)


def _constants(width: int, y: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK_D": block, "ROWS": max(TILE_CELLS // block, 1), "IS_ROW": y.ndim == 1}


def _share_rows(num_rows: int, rows: int) -> tuple[int, int]:
    """Return the number of programs and the rows of each, a multiple of ``rows``; the last may have fewer."""
    rows_each = rows * triton.cdiv(num_rows, rows * MAX_PROGRAMS)
    return (triton.cdiv(num_rows, rows_each) if num_rows else 0), rows_each
