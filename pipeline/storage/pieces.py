"""Checksums of the pieces of a large file, so that a part of it is read and verified without the rest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

PIECE_BYTES: Final = 1 << 20
"""Of a piece: a row group of a task's table lies in one or two, and one is hashed in 1.5 ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """The pieces of a file: each has ``piece_bytes`` bytes, but the last one may have fewer.

    Attributes:
        num_bytes: of the file.
        sha256: checksum of each piece.
    """

    num_bytes: int
    piece_bytes: int
    sha256: tuple[str, ...]

    def __post_init__(self) -> None:
        if min(self.num_bytes, self.piece_bytes) < 1 or len(self.sha256) != -(-self.num_bytes // self.piece_bytes):
            raise ValueError(f"{len(self.sha256)} checksums of pieces, which are not those of {self.num_bytes} bytes")

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Pieces:
        """Return what JSON says; TypeError or ValueError where that is not what pieces are."""
        return cls(**content | {"sha256": tuple(content["sha256"])})

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first byte of a piece and the one after its last."""
        start = number * self.piece_bytes
        return start, min(start + self.piece_bytes, self.num_bytes)


def checksum_file(path: Path) -> tuple[str, Pieces | None]:
    """Return the checksum of a file and its pieces; None for one that is no larger than a piece."""
    whole, sha256, num_bytes = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            whole.update(piece)
            sha256.append(hashlib.sha256(piece).hexdigest())
            num_bytes += len(piece)
    is_large = len(sha256) > 1
    pieces = Pieces(num_bytes=num_bytes, piece_bytes=PIECE_BYTES, sha256=tuple(sha256)) if is_large else None
    return whole.hexdigest(), pieces


class PieceReader(io.RawIOBase):
    """A file that is read through its pieces: those in which the bytes lie that are asked for, each once."""

    def __init__(self, pieces: Pieces, read_piece: Callable[[int], bytes]) -> None:
        """Read with ``read_piece``, which returns a piece by its number, verified and of the right size."""
        self._pieces, self._read_piece, self._position = pieces, cache(read_piece), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._pieces.num_bytes}[whence]
        self._position = max(origin + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill all of ``buffer``, or as much of it as the file has bytes left."""
        view, start = memoryview(buffer).cast("B"), self._position
        stop = min(start + len(view), self._pieces.num_bytes)
        while self._position < stop:
            number, first = divmod(self._position, self._pieces.piece_bytes)
            part = self._read_piece(number)[first : first + stop - self._position]
            view[self._position - start :][: len(part)] = part
            self._position += len(part)
        return max(self._position - start, 0)
