"""Find where the rows of a CSV file end: at a line feed before which the quotes are even in number."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np

Block: TypeAlias = bytes | bytearray

COUNTED_BYTES: Final = 1 << 18
"""Bytes whose line feeds are counted at once, in the cache of a core."""


def find_first_end(content: bytes) -> int:
    """Return the position after the first row, 0 where it does not end."""
    end = content.find(b"\n")
    while end >= 0:
        if content.count(b'"', 0, end) % 2 == 0:
            return end + 1
        end = content.find(b"\n", end + 1)
    return 0


def find_row_ends(block: Block, *, inside: bool) -> tuple[int, int]:
    """Return how many rows end in the block, and the position after the last end, 0 where there is none."""
    text = np.frombuffer(block, np.uint8)
    if not inside and b'"' not in block:
        steps = range(0, len(text), COUNTED_BYTES)
        counts = (np.count_nonzero(text[start : start + COUNTED_BYTES] == ord("\n")) for start in steps)
        return int(sum(counts)), block.rfind(b"\n") + 1
    quoted = (np.cumsum(text == ord('"')) + inside) % 2 == 1
    ends = np.flatnonzero((text == ord("\n")) & ~quoted)
    return len(ends), int(ends[-1]) + 1 if len(ends) else 0
