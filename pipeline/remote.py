"""Data sets in object storage: files come through a cache on this machine, named by their checksum.

The cache is shared by processes and outlives them.  Its rules:

* A file is written as ``<sha256>.part``, compared with the manifest, synced, and then renamed to ``<sha256>``.  So a
  crash leaves a part, which the next process that wants the file writes anew, and a data set that was changed has
  other names.
* Who writes a part holds it alone, who reads a file holds it together with others (``flock`` on the file itself, which
  the system lets go of when a process ends, however it ends).  Others that want a part wait, and find the file.
* Before a file is fetched, files that nobody holds are removed, the longest unused first, until all fit the limit.
* Only files of these names are ever removed, in a folder that was empty when it became a cache, which a tag marks.

fsspec and its file systems are imported when a URL is opened.  Timeouts, retries and credentials are theirs.
"""

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
from typing import Any, Final, TypeAlias

from pipeline.folder import Folder
from pipeline.schema import UserError

CACHE_BYTES: Final = "32GiB"

TAG_FILE: Final = "CACHEDIR.TAG"
TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# Shards that seqsetvae fetched; it removes them itself.\n"
"""Marks a cache; of a form that backup programs know (bford.info/cachedir)."""

CHUNK: Final = 1 << 24
"""Bytes asked of the store at once: each request has its own retries."""

S3_RETRIES: Final = 2
"""Of s3fs, which counts them twice when it reads, around five attempts of botocore (``AWS_MAX_ATTEMPTS``) at 15 s each:
a store that says nothing is given up after three to six minutes.  With s3fs's own 5 it would be half an hour."""

PART: Final = ".part"
"""Ends the names of files that are being written."""

Fetch: TypeAlias = Callable[[BufferedRandom, Callable[[int], None]], None]
"""Writes the content of a file to the one it is given, after it has asked for so many bytes of room."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_OWN: Final = re.compile(rf"[0-9a-f]{{64}}({re.escape(PART)})?")
_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def open_folder(
    directory: str | Path | Folder, *, cache_dir: str | Path | None = None, cache_bytes: str = CACHE_BYTES
) -> Folder:
    """The folder at a path or a URL; a folder is given back.

    Args:
        directory: a path, or what has ``://`` and fsspec knows (``s3://bucket/prefix``, ``gs://…``, ``memory://…``).
        cache_dir: where files of a URL are kept: a new or empty folder, or an older cache; by default
            ``seqsetvae`` in the user's cache directory.
        cache_bytes: the most of them, as in ``8GB`` or ``32GiB``; more only while more is in use.

    Raises:
        UserError: the URL cannot be opened, the folder is not fit for a cache, or ``cache_bytes`` is no size.
    """
    if isinstance(directory, Folder):
        return directory
    limit = parse_bytes(cache_bytes)
    if isinstance(directory, Path) or "://" not in directory:
        return Folder(directory)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return RemoteFolder(directory, Cache(Path(cache_dir or user_cache / "seqsetvae"), limit))


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


class RemoteFolder(Folder):
    """The data directory at a URL; its files are read through a cache."""

    mend = "upload the data set again"
    begin = "check the URL, and that the whole data directory was uploaded"

    def __init__(self, url: str, cache: Cache) -> None:
        super().__init__(url.rstrip("/"))
        self._cache = cache
        try:
            import fsspec  # noqa: PLC0415  # an optional package, which other data sets do without
        except ImportError:
            raise UserError(f"{self}: needs fsspec, which is not here; pip install 'seqsetvae[remote]'") from None
        try:
            # No instance that another part of the process made: it may have listings of earlier.
            self._system, self._root = fsspec.core.url_to_fs(self._at, skip_instance_cache=True)
            if "s3" in self._system.protocol:
                self._system.retries = S3_RETRIES
        except ImportError as error:
            raise UserError(f"{self}: {_line(error)}; pip install 'seqsetvae[remote]' is for s3://") from None
        except ValueError as error:
            raise UserError(f"{self}: {_line(error)}; give a URL such as s3://bucket/prefix") from None

    def read(self, name: str) -> bytes:
        with self._asking(name), self._open(name) as file:
            content: bytes = file.read()
        return content

    @contextmanager
    def file(self, name: str, sha256: str, *, num_bytes: int | None = None, verify: bool = True) -> Iterator[Path]:
        if not _SHA256.fullmatch(sha256):
            raise UserError(f"{self}/{name}: the manifest's checksum {sha256!r} is none; {self.mend}")

        def fetch(target: BufferedRandom, make_room: Callable[[int], None]) -> None:
            self._fetch(name, sha256, num_bytes, target, make_room)

        with self._cache.file(sha256, fetch, verify=verify and (name, sha256) not in self._whole) as path:
            if verify:
                self._whole.add((name, sha256))
            yield path

    def _fetch(
        self, name: str, sha256: str, num_bytes: int | None, target: BufferedRandom, make_room: Callable[[int], None]
    ) -> None:
        digest = hashlib.sha256()
        try:
            with self._asking(name):
                source = self._open(name)
        except FileNotFoundError:
            raise self._bad(name, "is missing") from None
        with source:
            size = num_bytes if source.size is None else source.size  # some stores do not say
            self._check_size(name, size or 0, num_bytes)
            make_room(size or 0)
            chunk = b"-"
            while chunk:
                with self._asking(name):
                    chunk = source.read(CHUNK)
                digest.update(chunk)
                target.write(chunk)
        self._check_size(name, target.tell(), num_bytes)
        self._check_sum(name, digest.hexdigest(), sha256)

    def _open(self, name: str) -> Any:
        return self._system.open(f"{self._root}/{name}", "rb", block_size=CHUNK, cache_type="none")

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Only around calls of the file system: what that raises is its own, of whatever class, but says why."""
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise UserError(f"{self}/{name}: access denied ({_line(error)}); check the credentials") from error
        except Exception as error:
            raise UserError(
                f"{self}/{name}: the store does not give it ({_line(error)}); check URL, credentials and network"
            ) from error


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


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
