"""Files that are whole or absent: atomic writes, checksums, JSON with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pipeline.schema import UserError

HASHED_BYTES: Final = 1 << 20  # of a file in memory at a time while its checksum is made
TEMPORARY_SUFFIX: Final = ".tmp"  # of files that are still being written


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of its content added, which does not depend on how the text is laid out."""
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def unseal(content: Any, path: Path | str, advice: str) -> dict[str, Any]:
    """Return what :func:`seal` was given; UserError with ``path`` and ``advice`` where the checksum is wrong."""
    plain = {name: value for name, value in content.items() if name != "sha256"} if isinstance(content, dict) else {}
    if seal(plain) != content:
        raise UserError(f"{path}: checksum of its content is wrong; {advice}")
    return plain


def sync(path: Path) -> None:
    """Wait until the content of a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_atomically(path: Path, *, is_synced: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; at the end the new file takes the place of the old one.

    At every moment, also after a power loss and with several writers, ``path`` is the old or the new file, whole.
    Not ``is_synced`` = nobody waits for the disk, and a power loss may leave a part of the new file: for files whose
    checksum is compared before an interrupted run goes on with them.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if is_synced:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if is_synced:
        sync(path.parent)


def remove_leftovers(folder: Path, name: str = "*", *, below: bool = False) -> None:
    """Remove temporary files of :func:`replace_atomically` that a killed process left; nobody may be writing them.

    They stand for files of this ``name`` in ``folder``, and with ``below`` in all folders in it, which must be our own.
    """
    leftovers = f".{name}.*{TEMPORARY_SUFFIX}"
    for path in folder.rglob(leftovers) if below else folder.glob(leftovers):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes, *, is_synced: bool = True) -> None:
    with replace_atomically(path, is_synced=is_synced) as temporary:
        temporary.write_bytes(content)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_crc32(path: Path) -> str:
    """Return size and CRC-32 of a file: they find damage in a third of the time of a SHA-256, and no intent."""
    crc, size = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASHED_BYTES):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return f"{size}-{crc:08x}"
