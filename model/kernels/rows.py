"""Sums of the rows of segments: the gradient of taking rows by index, without atomics or sorting on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.tiles import load_tile, rows_at

ROWS, COLUMNS = 16, 128


@triton.jit
def sum_kernel(
    rows, order, offsets, out, num_segments, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = segment < num_segments
    first = tl.load(offsets + segment, mask=exists, other=0)
    end = tl.load(offsets + segment + 1, mask=exists, other=0)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(first, end, ROWS):
        row, inside = rows_at(order, begin, end, ROWS, HAS_ORDER)
        total += tl.sum(load_tile(rows, row, column, WIDTH, inside, WIDTH).to(tl.float32), 0)
    tl.store(out + segment * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)


def sum_segments(rows: Tensor, order: Tensor | None, offsets: Tensor, num_segments: int) -> Tensor:
    """Return the sums over the rows of each segment, [num_segments, …], in the dtype of the rows.

    Args:
        rows: [N, …].
        order: [N] int64, the rows by segment; None where they come so.
        offsets: [G+1] int64, the first place of each segment; segments from G on have no rows.
        num_segments: at least G.
    """
    out = rows.new_empty(num_segments, *rows.shape[1:])
    width = rows[0].numel() if len(rows) else 0
    if out.numel() and width:
        grid = num_segments, triton.cdiv(width, COLUMNS)
        sum_kernel[grid](
            rows, order, offsets, out, len(offsets) - 1,
            WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS, HAS_ORDER=order is not None,
        )  # fmt: skip
    return out if width else out.zero_()
