"""The order of rows by several columns, through one integer a row where that can hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def sort_order(keys: Sequence[npt.NDArray[Any]], ties: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """Return the order by ``keys``, whole numbers or minus infinity, then by ``ties``, NaN last; stable.

    Where 64 bits hold their ranges the keys become one integer, which sorts several times as fast as columns do.  Where
    the row's number fits too, they are sorted as they are, in a tenth of the time that sorting positions takes.
    """
    num_rows = len(keys[0])
    packed, bits = _pack(keys) if num_rows else (None, 0)
    if packed is None:
        return np.lexsort([*reversed(ties), *reversed(keys)])
    row_bits = (num_rows - 1).bit_length()
    if bits + row_bits <= 64:
        packed <<= np.uint64(row_bits)
        packed |= np.arange(num_rows, dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64((1 << row_bits) - 1)).view(np.int64)
        packed >>= np.uint64(row_bits)
    else:
        order = np.argsort(packed, kind="stable")
        packed = packed[order]
    equal = packed[1:] == packed[:-1]
    if equal.any():
        tied = np.flatnonzero(np.concatenate([[False], equal]) | np.concatenate([equal, [False]]))
        rows = order[tied]
        order[tied] = rows[np.lexsort([*(tie[rows] for tie in reversed(ties)), packed[tied]])]
    return order


def _pack(keys: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[np.uint64] | None, int]:
    """Return keys as one integer in their order, and how many bits it has; None where 64 do not hold them."""
    packed, bits = np.zeros(len(keys[0]), np.uint64), 0
    for key in keys:
        low, high = key.min(), key.max()
        is_infinite = np.isneginf(key) if np.isneginf(low) else None
        if is_infinite is not None:  # it becomes 0, and the lowest number 1
            finite = key[~is_infinite]
            low, high = (finite.min() - 1, finite.max()) if len(finite) else (0, 0)
        span = int(high) - int(low) + 1
        bits += (width := span.bit_length())
        if bits > 64 or span >= 1 << 53:
            return None, bits
        number = np.subtract(key, low, dtype=np.float64 if key.dtype.kind == "f" else np.int64)
        if is_infinite is not None:
            number[is_infinite] = 0
        packed <<= np.uint64(width)
        packed |= number.astype(np.int64, copy=False).view(np.uint64)
    return packed, bits
