"""A folder of an object store, through fsspec: what lies there, and files to and from it.

fsspec and its file systems are imported when a URL is opened.  They decide about timeouts, retries and credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from pipeline.schema import UserError
from pipeline.storage.files import replace_atomically

CHUNK_BYTES: Final = 1 << 24  # of one request to the store: each has its own retries
THREADS: Final = 8
"""Files that travel at the same time."""

S3_RETRIES: Final = 2
"""Retries of s3fs, which counts them twice when it reads, around five attempts of botocore (``AWS_MAX_ATTEMPTS``) at
15 s each: a store that does not answer is given up after three to six minutes.  s3fs's own 5 take half an hour."""

VERSIONS: Final = ("ETag", "etag", "md5", "LastModified", "last_modified", "updated", "mtime", "created")
"""What file systems call that by which one content of a name is told from another."""


def is_url(place: str) -> bool:
    """Return whether a place is a URL that fsspec may know, and no path on this machine."""
    return "://" in place


class Stored(NamedTuple):
    """A file of a store: its size in bytes, and what tells this content of the name from another."""

    num_bytes: int
    version: str


class ObjectStore:
    """The files below a URL such as ``s3://bucket/prefix``."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec  # noqa: PLC0415  # an optional package, which local data sets do without
        except ImportError:
            raise UserError(f"{self.url}: needs fsspec, which is not here; pip install 'seqsetvae[remote]'") from None
        try:
            # A new instance: one that another part of the process made may have old listings.
            local = {"auto_mkdir": True} if self.url.startswith(("file://", "local://")) else {}
            self._system, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **local)
            if "s3" in self._system.protocol:
                self._system.retries = S3_RETRIES
        except ImportError as error:
            raise UserError(f"{self.url}: {_first_line(error)}; pip install 'seqsetvae[remote]' is for s3://") from None
        except ValueError as error:
            raise UserError(f"{self.url}: {_first_line(error)}; give a URL such as s3://bucket/prefix") from None

    def __str__(self) -> str:
        return self.url

    def open(self, name: str) -> Any:
        """Open a file for reading, in requests of ``CHUNK_BYTES``."""
        return self._system.open(self._locate(name), "rb", block_size=CHUNK_BYTES, cache_type="none")

    def list_files(self) -> dict[str, Stored]:
        """Return the files below the URL by their names relative to it; of the URL of a file, that file as ``""``.

        Raises:
            UserError: a name would lie elsewhere when it is taken for a path, or the store does not answer.
        """
        with self.report_errors(""):
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        files = {}
        for path, info in found.items():
            name = path.removeprefix(self._root).strip("/")
            if info["type"] != "file" or (path.endswith("/") and not info["size"]):  # stands for a folder
                continue
            if any(part in ("", ".", "..") for part in name.split("/")) and name:
                raise UserError(f"{self.url}/{name}: no name of a file; rename it")
            files[name] = Stored(info["size"] or 0, next((str(info[key]) for key in VERSIONS if key in info), ""))
        return files

    def read(self, name: str) -> bytes:
        """Return the content of a small file; FileNotFoundError where there is none."""
        with self.report_errors(name), self.open(name) as file:
            return bytes(file.read())

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes ``start`` … ``stop`` − 1 of a file, or as many of them as it has, in one request."""
        with self.report_errors(name):
            return bytes(self._system.cat_file(self._locate(name), start=start, end=stop))

    def fetch(self, name: str, target: Path, num_bytes: int) -> None:
        """Copy a file of the store to ``target``, whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.report_errors(name), replace_atomically(target) as temporary:
            with self.open(name) as source, temporary.open("wb") as file:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
                size = file.tell()
            if size != num_bytes:
                raise UserError(f"{self.url}/{name}: {size} bytes came, the store lists {num_bytes}; try again")

    def put(self, path: Path, name: str) -> None:
        """Copy a file to the store, which has the old or the new content at every moment."""
        with self.report_errors(name, "take"):
            self._system.put_file(str(path), self._locate(name))

    def put_bytes(self, content: bytes, name: str) -> None:
        """Write a small file to the store."""
        with self.report_errors(name, "take"):
            self._system.pipe_file(self._locate(name), content)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is gone already is no error."""
        for name in names:
            with suppress(FileNotFoundError), self.report_errors(name, "remove"):
                self._system.rm_file(self._locate(name))

    def _locate(self, name: str) -> str:
        return f"{self._root}/{name}" if name else str(self._root)

    @contextmanager
    def report_errors(self, name: str, what: str = "give") -> Iterator[None]:
        """Turn an error of the file system, which may be of any class, into a UserError that says why.

        ``what`` is what the store is to do: give, take or remove a file.
        """
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except PermissionError as error:
            raise UserError(f"{where}: access denied ({_first_line(error)}); check the credentials") from error
        except Exception as error:
            reason = f"the store does not {what} it ({_first_line(error)}); check URL, credentials and network"
            raise UserError(f"{where}: {reason}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of what an error says, or else its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def do_all(work: Callable[[str], None], items: Iterable[str]) -> None:
    """Call ``work`` with each item, ``THREADS`` at a time; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
