"""Data sets in object storage: files come through a cache on this machine, named by their checksum.

The cache is shared by processes and outlives them.  Its rules:

* A file is written as ``<sha256>.part``, compared with the manifest, synced, and then renamed to ``<sha256>``.  A crash
  therefore leaves a part, which the next process that needs the file writes again.
* A writer locks its part exclusively and readers share a lock on a file (``flock`` on the file itself, which the system
  releases when a process ends, however it ends).  Others that need a part wait, and then find the file.
* A part is also removed when its fetch fails or the process ends meanwhile (but for an empty one that was made that
  moment); ``pipeline.storage.ahead`` fetches several at once.
* Before a file is fetched, files that are not locked are removed, the least recently used first, until all fit.
* Only files with these names are ever removed, in a folder that was empty when it became a cache, which a tag marks.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Final

from pipeline.schema import UserError
from pipeline.storage.cache import CACHE_BYTES, Cache, parse_bytes
from pipeline.storage.folder import File, Folder
from pipeline.storage.object_store import CHUNK_BYTES, ObjectStore, is_url
from pipeline.storage.pieces import Pieces

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def open_folder(
    directory: str | Path | Folder, *, cache_dir: str | Path | None = None, cache_bytes: str = CACHE_BYTES
) -> Folder:
    """Return the folder at a path or a URL; a folder is returned as it is.

    Args:
        directory: a path, or a URL with ``://`` that fsspec knows (``s3://bucket/prefix``, ``gs://…``, ``memory://…``).
        cache_dir: where files of a URL are cached: a new or empty folder, or an older cache; by default
            ``seqsetvae`` in the user's cache directory.
        cache_bytes: the maximum size of the cache, such as ``8GB`` or ``32GiB``; files in use may exceed it.
    """
    if isinstance(directory, Folder):
        return directory
    max_bytes = parse_bytes(cache_bytes)
    if isinstance(directory, Path) or not is_url(directory):
        return Folder(directory)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return RemoteFolder(directory, Cache(Path(cache_dir or user_cache / "seqsetvae"), max_bytes))


class RemoteFolder(Folder):
    """The data directory at a URL; its files are read through a cache."""

    repair_advice = "upload the data set again"

    @property
    def manifest_advice(self) -> str:
        return "check the URL, and that the whole data directory was uploaded"

    def __init__(self, url: str, cache: Cache) -> None:
        super().__init__(url.rstrip("/"))
        self._cache, self.room = cache, cache.max_bytes
        self._store = ObjectStore(self._location)

    def read(self, name: str) -> bytes:
        return self._store.read(name)

    @contextmanager
    def local_file(self, file: File, cancelled: threading.Event | None = None) -> Iterator[Path]:
        name, sha256, num_bytes, verify, _ = file
        self._check_name(name, sha256)
        fetch = partial(self._fetch, name, sha256, num_bytes, cancelled or threading.Event())
        with self._cache.local_file(sha256, fetch, verify=verify and (name, sha256) not in self._verified) as path:
            if verify:
                self._verified.add((name, sha256))
            yield path

    def _read_piece(self, file: File, pieces: Pieces, number: int) -> bytes:
        self._check_name(file.name, sha256 := pieces.sha256[number])
        fetch = partial(self._fetch_piece, file._replace(verify=True), pieces, number)
        with self._cache.local_file(sha256, fetch, verify=file.verify) as path:
            return self._check_piece(file._replace(verify=False), pieces, number, path.read_bytes())

    def _fetch_piece(
        self, file: File, pieces: Pieces, number: int, target: BufferedRandom, make_room: Callable[[int], None]
    ) -> None:
        """Copy a piece of a file of the store to ``target`` and compare it with its checksum."""
        try:
            with self._store.report_errors(file.name):
                content = self._store.read_range(file.name, *pieces.bounds(number))
        except FileNotFoundError:
            raise self._bad_file(file.name, "is missing") from None
        self._check_piece(file, pieces, number, content)
        make_room(len(content))
        target.write(content)

    def _check_name(self, name: str, sha256: str) -> None:
        """Refuse a checksum that would be no name of a file in the cache."""
        if not _SHA256.fullmatch(sha256):
            raise UserError(f"{self}/{name}: the manifest's checksum {sha256!r} is none; {self.repair_advice}")

    def _fetch(
        self,
        name: str,
        sha256: str,
        num_bytes: int | None,
        cancelled: threading.Event,
        target: BufferedRandom,
        make_room: Callable[[int], None],
    ) -> None:
        """Copy a file of the store to ``target`` and compare it with the manifest."""
        digest = hashlib.sha256()
        try:
            with self._store.report_errors(name):
                source = self._store.open(name)
        except FileNotFoundError:
            raise self._bad_file(name, "is missing") from None
        with source:
            size = num_bytes if source.size is None else source.size  # some stores do not tell
            self._check_size(name, size or 0, num_bytes)
            make_room(size or 0)
            chunk = b"-"
            while chunk:
                if cancelled.is_set():
                    raise UserError(f"{self}/{name}: is not needed any more")
                with self._store.report_errors(name):
                    chunk = source.read(CHUNK_BYTES)
                digest.update(chunk)
                target.write(chunk)
        self._check_size(name, target.tell(), num_bytes)
        self._check_sha256(name, digest.hexdigest(), sha256)
