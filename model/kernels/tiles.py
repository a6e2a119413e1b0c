"""Loads and stores that kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, rows, columns, stride, row_mask, WIDTH: tl.constexpr):
    """Return the tile [rows, columns] of a matrix; 0 outside."""
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, tile, rows, columns, stride, row_mask, WIDTH: tl.constexpr):
    """Write the tile [rows, columns] of a matrix, in the matrix's dtype."""
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rows_at(order, begin, end, ROWS: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Return the rows at the places from ``begin`` of an order of rows, or the places themselves, and which exist."""
    row = begin + tl.arange(0, ROWS)
    inside = row < end
    if HAS_ORDER:
        row = tl.load(order + row, mask=inside, other=0)
    return row, inside
