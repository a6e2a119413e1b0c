"""Large CSV files, cut between rows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from pipeline.prepare.sources.source import PIECE_BYTES, Piece, unreadable

BLOCK_BYTES: Final = 1 << 22


def csv_pieces(path: Path, name: str) -> list[Piece]:
    """Ranges of about ``PIECE_BYTES`` bytes, each from the start of a row to the end of one; the first has the header.

    A line feed ends a row where the quotes before it are even in number: inside of quotes it is text, and a doubled
    quote counts twice.

    Raises:
        UserError: the file cannot be read.
    """
    pieces: list[Piece] = []
    position = start = quotes = rows = 0
    first_row = 1
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                num_rows, end = _row_ends(block, inside=quotes % 2 == 1)
                quotes += block.count(b'"')
                rows += num_rows
                if end and position + end - start >= PIECE_BYTES:
                    pieces.append(Piece(files=(name,), start=start, stop=position + end, first_row=first_row))
                    start, first_row = position + end, rows  # the header is a row too many, and rows count from 1
                position += len(block)
    except OSError as error:
        raise unreadable(path, error) from None
    if start < position:
        pieces.append(Piece(files=(name,), start=start, stop=position, first_row=first_row))
    return pieces


def _row_ends(block: bytes, *, inside: bool) -> tuple[int, int]:
    """How many rows end in the block, and the place after the last of them, 0 where there is none."""
    if not inside and b'"' not in block:
        return block.count(b"\n"), block.rfind(b"\n") + 1
    text = np.frombuffer(block, np.uint8)
    odd = (np.cumsum(text == ord('"')) + inside) % 2 == 1
    ends = np.flatnonzero((text == ord("\n")) & ~odd)
    return len(ends), int(ends[-1]) + 1 if len(ends) else 0
