"""Rows of text files whose numbers are read as numbers, and the texts of those of them that are rejected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import polars as pl

from pipeline.prepare.sources.reading import FILE, ROW, as_text

ReadTexts: TypeAlias = Callable[[pl.DataFrame], pl.DataFrame]
"""Returns ``file``, ``row`` and the other columns of rejects as they came, of rows with ``file`` and ``row``."""


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows of a file or of a part of one: ``file``, ``row`` and columns by their roles."""

    frame: pl.DataFrame
    read_again: Callable[[], pl.DataFrame] | None = None  # with text, where ``frame`` has it as numbers


def choose_frames(parts: Sequence[FileRows]) -> tuple[list[pl.DataFrame], ReadTexts | None]:
    """Return the rows of all parts, and what reads texts where they have numbers instead of them.

    They do where each part has: rows of other types would come in another order.
    """
    if all(part.read_again for part in parts):
        return [part.frame for part in parts], partial(_read_texts, parts)
    return [part.read_again() if part.read_again else part.frame for part in parts], None


def _read_texts(parts: Sequence[FileRows], rows: pl.DataFrame) -> pl.DataFrame:
    found = []
    for part in parts:
        own = rows.join(part.frame.select(FILE, ROW), on=[FILE, ROW], how="semi", maintain_order="left")
        if own.height and part.read_again:
            texts = part.read_again()[own[ROW] - part.frame[ROW][0]]
            found.append(texts.select(FILE, ROW, *as_text(texts)))
    return pl.concat(found)
