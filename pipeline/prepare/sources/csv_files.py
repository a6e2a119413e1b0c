"""Read CSV files of any size, packed or not, in parts of whole rows."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa

from pipeline.prepare.sources.csv_rows import ADVICE
from pipeline.prepare.sources.listing import CODECS, SEPARATORS
from pipeline.prepare.sources.reading import PIECE_BYTES, Piece, reading
from pipeline.prepare.sources.row_ends import Block, find_first_end, find_row_ends
from pipeline.schema import UserError

BLOCK_BYTES: Final = 1 << 22

MAX_PACKING: Final = 8
"""Approximate bytes of text in a byte of a packed file."""

MARKS: Final = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the bytes with which their files begin, as Excel and other programs of Windows write them."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the text of a file is to be read; None = as its name says."""

    separator: str | None = None
    encoding: str = "utf-8"

    def separator_of(self, path: Path) -> str:
        if self.separator is not None:
            return self.separator
        return next((SEPARATORS[suffix] for suffix in map(str.lower, path.suffixes) if suffix in SEPARATORS), ",")

    def to_utf8(self, path: Path, content: bytes, first_row: int) -> bytes:
        """Return the text as UTF-8; raise UserError where it is in another encoding."""
        try:
            if is_recoded(self.encoding) or codecs.lookup(self.encoding).name == "utf-8":
                if not content.isascii():  # which takes a tenth of the time
                    content.decode()
                return content
            return content.decode(self.encoding).encode()
        except UnicodeDecodeError as error:
            row = first_row + content[: error.start].count(b"\n")
            problem = f"row {row} is not in the encoding {self.encoding}"
            raise UserError(f"{path}: cannot be read ({problem}); say which it is, e.g. --encoding latin-1") from None


UTF8: Final = Dialect()


@lru_cache(maxsize=4)
def is_recoded(encoding: str) -> bool:
    """Return whether text of an encoding becomes UTF-8 as it is read, as line feeds and quotes are no bytes in it."""
    ascii_bytes = bytes(range(128))
    if codecs.lookup(encoding).name == "utf-8":
        return False
    is_bytewise = len(bytes(range(256)).decode(encoding, "replace")) == 256
    return not is_bytewise or ascii_bytes.decode(encoding, "replace") != ascii_bytes.decode()


def parse_encoding(text: str) -> str:
    """Return the name of an encoding; raise ValueError where Python knows none of that name."""
    try:
        "".encode(text)
    except LookupError:
        raise ValueError(f"{text!r} is no encoding; e.g. latin-1, cp1252 or utf-16") from None
    return text


def parse_separator(text: str) -> str:
    """Return a separator of one byte; tab is also written as a backslash and t."""
    text = text.replace("\\t", "\t")
    if len(text.encode()) != 1 or text in '"\r\n':
        raise ValueError(f"{text!r} is not one character, such as ; or \\t")
    return text


def is_stream(path: Path, dialect: Dialect) -> bool:
    """Return whether a file can be read from its beginning alone: it is packed, or of an encoding like UTF-16."""
    return path.suffix.lower() in CODECS or _find_encoding(path, dialect) is not None


@contextmanager
def open_text(path: Path, dialect: Dialect) -> Iterator[Any]:
    """Open a file and unpack it while it is read; whatever is wrong with it is a UserError."""
    encoding = _find_encoding(path, dialect)
    with reading(path), _open_bytes(path) as file:
        yield file if encoding is None else _Utf8Stream(io.TextIOWrapper(file, encoding, newline=""))


@contextmanager
def _open_bytes(path: Path) -> Iterator[Any]:
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        with path.open("rb") as file:
            yield file
        return
    with pa.OSFile(str(path)) as packed, pa.CompressedInputStream(packed, codec) as stream:
        yield stream


def _find_encoding(path: Path, dialect: Dialect) -> str | None:
    """Return the encoding from which a file becomes UTF-8 as it is read: one that is said, or that its mark tells."""
    if codecs.lookup(dialect.encoding).name != "utf-8":
        return dialect.encoding if is_recoded(dialect.encoding) else None
    with reading(path), _open_bytes(path) as file:
        first = file.read(4)
    return next((encoding for mark, encoding in MARKS.items() if first.startswith(mark)), None)


@dataclass(frozen=True, slots=True)
class _Utf8Stream:
    """Reads a text as the bytes that it has in UTF-8, some more than it is asked for."""

    text: io.TextIOWrapper

    def read(self, size: int) -> bytes:
        return self.text.read(size).encode()


def read_header(path: Path, dialect: Dialect) -> list[str]:
    """Return the names of the columns, without blanks at their ends."""
    with open_text(path, dialect) as file:
        first = _read_first_row(path, file)
    text = dialect.to_utf8(path, first, 0).decode().removeprefix("\ufeff").rstrip("\r\n")
    if "\0" in text:
        problem = "its header holds bytes of zero, as UTF-16 has"
        raise UserError(f"{path}: cannot be read ({problem}); say which it is, e.g. --encoding utf-16-le")
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=dialect.separator_of(path)), [])
    except csv.Error:
        raise UserError(f"{path}: cannot be read (its header is no row); {ADVICE}") from None
    return [name.strip() for name in names]


def _read_first_row(path: Path, file: IO[bytes]) -> bytes:
    content = b""
    while block := file.read(1 << 16):
        content += block
        end = find_first_end(content)
        if end:
            return content[:end]
    if not content:
        raise UserError(f"{path}: cannot be read (it is empty); give a whole, valid file, or leave it out")
    return content


def cut_csv(path: Path, name: str) -> tuple[list[Piece], str]:
    """Return ranges of about ``PIECE_BYTES`` bytes, each of whole rows, and the file's sha256, for it is read once.

    The first range has the header.  A line feed ends a row where the quotes before it are even in number: inside of
    quotes it is text, and a doubled quote counts twice.
    """
    pieces, checksum = [], hashlib.sha256()
    with reading(path), path.open("rb") as file:
        for start, stop, first_row, _ in _cut(_read_blocks(file, checksum.update), keep=False):
            pieces.append(Piece(files=(name,), start=start, stop=stop, first_row=first_row))
    return pieces, checksum.hexdigest()


def _read_blocks(file: io.BufferedReader, see: Callable[[bytearray], None]) -> Iterator[bytearray]:
    """Yield blocks of a file, each in the place of the one before: new memory takes longer than reading does."""
    buffer = bytearray(BLOCK_BYTES)
    while size := file.readinto(buffer):
        block = buffer if size == len(buffer) else buffer[:size]
        see(block)
        yield block


def find_beginning(path: Path, dialect: Dialect, num_bytes: int) -> tuple[int, float]:
    """Return where the last row of the first ``num_bytes`` ends, and the share of the file that lies before it."""
    with open_text(path, dialect) as file:
        first = file.read(num_bytes)
    if len(first) < num_bytes:
        return len(first), 1.0
    end = find_row_ends(first, inside=False)[1] or len(first)
    return end, min(1.0, end / path.stat().st_size / (MAX_PACKING if is_stream(path, dialect) else 1))


def _cut(blocks: Iterable[Block], *, keep: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (start, stop, number of the first data row, content if ``keep``) of parts of whole rows."""
    held: list[Block] = []
    position = start = num_quotes = num_rows = 0
    first_row = 1
    for block in blocks:
        num_ends, end = find_row_ends(block, inside=num_quotes % 2 == 1)
        num_quotes += block.count(b'"') if b'"' in block else 0  # mostly none, which is found at once
        num_rows += num_ends
        if end and position + end - start >= PIECE_BYTES:
            yield start, position + end, first_row, b"".join([*held, block[:end]]) if keep else b""
            held, block_rest = [], block[end:]
            start, first_row = position + end, num_rows  # with the header, and rows count from 1
            position += len(block)
            held = [block_rest] if keep else []
            continue
        position += len(block)
        if keep:
            held.append(block)
    if start < position:
        yield start, position, first_row, b"".join(held)


def read_parts(path: Path, piece: Piece, dialect: Dialect) -> Iterator[tuple[bytes, int]]:
    """Yield the rows of a file of a piece without its header, in parts of bounded size, and their first rows' numbers.

    The next part is unpacked by a thread while one is worked on.
    """
    with open_text(path, dialect) as file:
        if piece.stop:
            if piece.start:
                file.seek(piece.start)
            num_bytes = piece.stop - piece.start
            parts: Iterator[tuple[int, int, int, bytes]] = iter(
                [(piece.start, piece.stop, piece.first_row, file.read(num_bytes)[:num_bytes])]
            )
        else:
            parts = _cut(iter(partial(file.read, BLOCK_BYTES), b""), keep=True)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, parts, None)
            while (part := coming.result()) is not None:
                coming = thread.submit(next, parts, None)
                start, _, first_row, content = part
                if not start:
                    content = content[find_first_end(content) or len(content) :]
                yield dialect.to_utf8(path, content, first_row), first_row
