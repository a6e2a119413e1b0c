"""Files that are whole or absent: atomic writes, checksums, sealed JSON."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pipeline.schema import (
    UserError,
)

TEMPORARY: Final = ".tmp"
"""Ends the names of files that are not complete."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of what it says, however it will be laid out."""
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def unsealed(content: Any, path: Path | str, mend: str) -> dict[str, Any]:
    """What :func:`sealed` was given; UserError where ``path`` holds something else."""
    plain = {name: value for name, value in content.items() if name != "sha256"} if isinstance(content, dict) else {}
    if sealed(plain) != content:
        raise UserError(f"{path}: checksum of its content is wrong; {mend}")
    return plain


def sync(path: Path) -> None:
    """Wait until the content of ``path`` (a file or a directory) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new path beside ``path`` to write to, which then takes its place.

    ``path`` is the old file or the new one, whole, at every moment, through power loss too, and whoever else writes it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove_leftovers(folder: Path, name: str = "*", *, below: bool = False) -> None:
    """Remove what a killed process left of :func:`replacing` files of that name in ``folder``, and ``below`` it where
    all is ours; nobody else may be writing them.
    """
    leftovers = f".{name}.*{TEMPORARY}"
    for path in folder.rglob(leftovers) if below else folder.glob(leftovers):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` by way of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
