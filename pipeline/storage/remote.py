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

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any, Final

from pipeline.schema import UserError
from pipeline.storage.cache import CACHE_BYTES, Cache, parse_bytes
from pipeline.storage.folder import Folder

CHUNK: Final = 1 << 24
"""Bytes asked of the store at once: each request has its own retries."""

S3_RETRIES: Final = 2
"""Of s3fs, which counts them twice when it reads, around five attempts of botocore (``AWS_MAX_ATTEMPTS``) at 15 s each:
a store that says nothing is given up after three to six minutes.  With s3fs's own 5 it would be half an hour."""


_SHA256: Final = re.compile(r"[0-9a-f]{64}")


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


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
