"""A bounded cache of files on this machine, named by their checksum and shared by processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Final, TypeAlias

from pipeline.schema import UserError

CACHE_BYTES: Final = "32GiB"


TAG_FILE: Final = "CACHEDIR.TAG"


TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# Shards that seqsetvae fetched; it removes them itself.\n"
"""Marks a cache; of a form that backup programs know (bford.info/cachedir)."""


PART: Final = ".part"
"""Ends the names of files that are being written."""


Fetch: TypeAlias = Callable[[BufferedRandom, Callable[[int], None]], None]
"""Writes the content of a file to the one it is given, after it has asked for so many bytes of room."""


_OWN: Final = re.compile(rf"[0-9a-f]{{64}}({re.escape(PART)})?")


_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def parse_bytes(text: str) -> int:
    """``8GB``, ``32 GiB``, ``1.5T``, ``1000`` as bytes.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    unit = match and (match[2] if match[2] in _UNITS else match[2] + "B")
    if match is None or unit not in _UNITS:
        raise UserError(f"--cache_bytes {text}: give a size such as 8GB or 32GiB")
    return int(float(match[1]) * _UNITS[unit])


class Cache:
    """Files by their checksum in ``directory``, which is made, or must be empty or a cache already."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        tag = directory / TAG_FILE
        with self._writing():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                content = tag.read_bytes() if tag.exists() else b""
                if content == TAG:
                    return
                others = [path.name for path in directory.iterdir() if path != tag]
                if others or not TAG.startswith(content):  # a crash may have left a part of it
                    name = min(others, default=TAG_FILE)
                    raise UserError(f"--cache_dir {directory}: holds {name!r} and is no cache; name a new folder")
                tag.write_bytes(TAG)

    @contextmanager
    def file(self, sha256: str, fetch: Fetch, *, verify: bool) -> Iterator[Path]:
        """A path of the file of this checksum, which stays there while the context lasts.

        Args:
            sha256: of its content.
            fetch: called where it is not there.
            verify: whether a file that is there is read first, and fetched again where it is damaged.
        """
        path = self._directory / sha256
        while True:  # another process may remove the file between two steps
            with _held(path, fcntl.LOCK_SH) as file:
                if file is not None and (not verify or hashlib.file_digest(file, "sha256").hexdigest() == sha256):
                    os.utime(path)
                    yield path
                    return
            if file is not None:
                print(f"warning: {path}: damaged; it is fetched again", file=sys.stderr)
                _remove(path, fcntl.LOCK_EX)
            with self._writing():
                if self._add(path, fetch):
                    verify = False

    def _add(self, path: Path, fetch: Fetch) -> bool:
        """Whether this process has fetched the file; otherwise another one has been at it."""
        part = path.with_name(path.name + PART)
        part.touch(mode=0o600)
        with _held(part, fcntl.LOCK_EX) as file:
            if file is None or path.exists():
                if file is not None:
                    part.unlink()
                return False
            try:
                file.truncate(0)
                fetch(file, lambda num_bytes: self._make_room(file, num_bytes))
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                part.unlink()
                raise
        return True

    def _make_room(self, file: BufferedRandom, num_bytes: int) -> None:
        """Remove files until one of ``num_bytes`` fits, and give ``file`` that size, so that others count it."""
        with self._locked():
            used = []
            for entry in os.scandir(self._directory):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if _OWN.fullmatch(entry.name) and stat.S_ISREG(status.st_mode):
                        used.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
            excess = sum(size for _, size, _ in used) + num_bytes - self._limit
            for _, size, path in sorted(used):
                if excess > 0 and _remove(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    excess -= size
            file.truncate(num_bytes)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time decides what is removed."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--cache_dir {self._directory}: cannot be used ({error.strerror}); free some space or name another"
            ) from None


@contextmanager
def _held(path: Path, how: int) -> Iterator[BufferedRandom | None]:
    """The file at ``path``, locked; None where there is none (any more), or where LOCK_NB would have to wait."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        file = None
    if file is None:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, how)
            there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            there = False
        yield file if there else None


def _remove(path: Path, how: int) -> bool:
    """Whether the file was there and, under the lock ``how``, could be removed."""
    with _held(path, how) as file:
        if file is not None:
            path.unlink()
        return file is not None
