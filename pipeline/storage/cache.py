"""A bounded cache of files on this machine, named by their checksum and shared by processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Final, TypeAlias

from pipeline.schema import UserError

CACHE_BYTES: Final = "32GiB"
PART_SUFFIX: Final = ".part"  # of files that are still being written

# A tag marks a folder as a cache, in the form that backup programs know (bford.info/cachedir).
TAG_FILE: Final = "CACHEDIR.TAG"
TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# Shards that seqsetvae fetched; it removes them itself.\n"

Fetch: TypeAlias = Callable[[BufferedRandom, Callable[[int], None]], None]
"""Writes the content of a file into its first argument, after a call of its second with the size in bytes."""

_CACHED_NAME: Final = re.compile(rf"[0-9a-f]{{64}}({re.escape(PART_SUFFIX)})?")


def parse_bytes(text: str, flag: str = "--cache_bytes") -> int:
    """Return the bytes of a size such as ``8GB``, ``32 GiB``, ``1.5T`` or ``1000``; UserError names ``flag``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if match is None or (match[3] and not match[2]):
        raise UserError(f"{flag} {text}: give a size such as 8GB or 32GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


class Cache:
    """Files by their checksum in ``directory``, which is made, or must be empty or a cache already."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self.max_bytes = directory, max_bytes
        tag = directory / TAG_FILE
        with self._report_write_errors():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._lock_directory():
                content = tag.read_bytes() if tag.exists() else b""
                if content == TAG:
                    return
                others = [path.name for path in directory.iterdir() if path != tag]
                if others or not TAG.startswith(content):  # a crash may have left a part of it
                    name = min(others, default=TAG_FILE)
                    raise UserError(f"--cache_dir {directory}: holds {name!r} and is no cache; name a new folder")
                tag.write_bytes(TAG)

    @contextmanager
    def local_file(self, sha256: str, fetch: Fetch, *, verify: bool) -> Iterator[Path]:
        """Yield the path of the file with this checksum, which is not removed while the context lasts.

        ``fetch`` is called if it is not in the cache; with ``verify`` also if it is there and turns out to be damaged.
        """
        path = self._directory / sha256
        while True:  # another process may remove the file between two steps
            with _lock_file(path, fcntl.LOCK_SH) as file:
                if file is not None and (not verify or hashlib.file_digest(file, "sha256").hexdigest() == sha256):
                    os.utime(path)
                    yield path
                    return
            if file is not None:
                print(f"warning: {path}: damaged; it is fetched again", file=sys.stderr)
                _remove_file(path, fcntl.LOCK_EX)
            with self._report_write_errors():
                if self._add_file(path, fetch):
                    verify = False

    def _add_file(self, path: Path, fetch: Fetch) -> bool:
        """Fetch a file and return True; return False if another process was faster, and try again then."""
        part = path.with_name(path.name + PART_SUFFIX)
        part.touch(mode=0o600)
        with _lock_file(part, fcntl.LOCK_EX) as file:
            if file is None:
                return False
            if path.exists():
                part.unlink()
                return False
            remove = weakref.finalize(file, _remove_part, part, os.getpid())  # also when the process ends meanwhile
            try:
                file.truncate(0)
                fetch(file, lambda num_bytes: self._make_room(file, num_bytes))
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                remove()
                raise
            remove.detach()
        return True

    def _make_room(self, file: BufferedRandom, num_bytes: int) -> None:
        """Remove the least recently used files until ``file`` fits, and give it its size, so that others count it."""
        with self._lock_directory():
            cached = []
            for entry in os.scandir(self._directory):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if _CACHED_NAME.fullmatch(entry.name) and stat.S_ISREG(status.st_mode):
                        cached.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
            excess = sum(size for _, size, _ in cached) + num_bytes - self.max_bytes
            for _, size, path in sorted(cached):
                if excess > 0 and _remove_file(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    excess -= size
            file.truncate(num_bytes)

    @contextmanager
    def _lock_directory(self) -> Iterator[None]:
        """Let one process at a time decide which files are removed."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _report_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"cannot be used ({error.strerror}); free some space or name another"
            raise UserError(f"--cache_dir {self._directory}: {reason}") from None


@contextmanager
def _lock_file(path: Path, operation: int) -> Iterator[BufferedRandom | None]:
    """Yield the file at ``path``, locked; None if there is none (any more), or if LOCK_NB would have to wait."""
    with ExitStack() as stack:
        file = None
        with suppress(BlockingIOError, FileNotFoundError):
            opened = stack.enter_context(path.open("r+b"))
            fcntl.flock(opened, operation)
            file = opened if os.path.samestat(os.fstat(opened.fileno()), path.stat()) else None
        yield file


def _remove_part(part: Path, process: int) -> None:
    if os.getpid() == process:  # a fork took the callback along, and not the file
        part.unlink(missing_ok=True)


def _remove_file(path: Path, operation: int) -> bool:
    """Remove the file under the lock ``operation``; return whether it existed and could be locked."""
    with _lock_file(path, operation) as file:
        if file is not None:
            path.unlink()
        return file is not None
