"""Cut large CSV files between rows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from pipeline.prepare.sources.reading import PIECE_BYTES, Piece, reading

BLOCK_BYTES: Final = 1 << 22


def cut_csv(path: Path, name: str) -> list[Piece]:
    """Return ranges of about ``PIECE_BYTES`` bytes, each of whole rows; the first one has the header.

    A line feed ends a row where the quotes before it are even in number: inside of quotes it is text, and a doubled
    quote counts twice.
    """
    pieces: list[Piece] = []
    position = start = num_quotes = num_rows = 0
    first_row = 1
    with reading(path), path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            num_ends, end = _find_row_ends(block, inside=num_quotes % 2 == 1)
            num_quotes += block.count(b'"')
            num_rows += num_ends
            if end and position + end - start >= PIECE_BYTES:
                pieces.append(Piece(files=(name,), start=start, stop=position + end, first_row=first_row))
                start, first_row = position + end, num_rows  # with the header, and rows count from 1
            position += len(block)
    if start < position:
        pieces.append(Piece(files=(name,), start=start, stop=position, first_row=first_row))
    return pieces


def _find_row_ends(block: bytes, *, inside: bool) -> tuple[int, int]:
    """Return how many rows end in the block, and the position after the last end, 0 where there is none."""
    if not inside and b'"' not in block:
        return block.count(b"\n"), block.rfind(b"\n") + 1
    text = np.frombuffer(block, np.uint8)
    quoted = (np.cumsum(text == ord('"')) + inside) % 2 == 1
    ends = np.flatnonzero((text == ord("\n")) & ~quoted)
    return len(ends), int(ends[-1]) + 1 if len(ends) else 0
