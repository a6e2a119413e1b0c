"""A folder with the files of a data set; each file is compared with the manifest when it is first read."""

from __future__ import annotations

import errno
import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.schema import UserError
from pipeline.storage.files import file_sha256
from pipeline.storage.pieces import PieceReader, Pieces


class BadFile(UserError):
    """A file is missing, or is not what the manifest says; ``reason`` is what is wrong with it, without its name."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(f"{where}: {reason}; {advice}")
        self.reason = reason


class File(NamedTuple):
    """A file as a folder is asked for it: what the manifest says of it, and whether to compare.

    ``pieces`` serve :meth:`Folder.open` alone; None = it has none, and is read as a whole.
    """

    name: str
    sha256: str
    num_bytes: int | None = None
    verify: bool = True
    pieces: Pieces | None = None


class Folder:
    """A data directory on this machine; ``pipeline.storage.remote.RemoteFolder`` is one elsewhere.

    The object remembers which files it has verified, so a process should use one object and no other process this one.
    """

    repair_advice = "copy the data set again, or run preprocess.py again"  # about a bad file

    room: int | None = None
    """Bytes that files which have been fetched may take; None = files lie on this machine and are not fetched."""

    def __init__(self, path: str | Path) -> None:
        self._location = str(path)
        self._verified: set[tuple[str, str]] = set()

    def __str__(self) -> str:
        return self._location

    @property
    def manifest_advice(self) -> str:
        """What to do where there is no manifest: a folder of raw tables has to be prepared."""
        folder = Path(self._location)
        if folder.is_dir() and any(folder.iterdir()):
            return f"prepare the folder first: python preprocess.py {folder} --output DATA; then name DATA"
        return "name the folder that preprocess.py wrote (--output)"

    def read(self, name: str) -> bytes:
        """Return the content of a small file as it is now; OSError if it cannot be read."""
        return (Path(self._location) / name).read_bytes()

    @contextmanager
    def local_file(self, file: File, cancelled: threading.Event | None = None) -> Iterator[Path]:
        """Yield a path on this machine at which the file lies while the context lasts.

        With ``verify`` it is compared, the first time, with the manifest's checksum and size, if that has one.  A fetch
        ends early, with an error, once ``cancelled`` is set.

        Raises:
            BadFile: the file is missing, damaged or another one.
            UserError: it cannot be read, which need not be the file's fault.
        """
        name, sha256, num_bytes, verify, _ = file
        path = Path(self._location) / name
        if verify and (name, sha256) not in self._verified:
            with self._report_missing(name):
                self._check_size(name, path.stat().st_size, num_bytes)
                self._check_sha256(name, file_sha256(path), sha256)
            self._verified.add((name, sha256))
        yield path

    @contextmanager
    def open(self, file: File) -> Iterator[Path | io.RawIOBase]:
        """Yield a file of which parts are read: where it lies on this machine, or what reads its pieces.

        A piece is compared with its own checksum when it is read, so that nothing else of the file is.

        Raises:
            BadFile, UserError: as :meth:`local_file` does; of a file in pieces, what reading them raises.
        """
        if (pieces := file.pieces) is not None:
            yield PieceReader(pieces, lambda number: self._read_piece(file, pieces, number))
            return
        with self.local_file(file) as path:
            yield path

    def _read_piece(self, file: File, pieces: Pieces, number: int) -> bytes:
        """Return a piece of a file, compared with its checksum where the file is to be; its size is right."""
        start, stop = pieces.bounds(number)
        with self._report_missing(file.name), (Path(self._location) / file.name).open("rb") as opened:
            opened.seek(start)
            return self._check_piece(file, pieces, number, opened.read(stop - start))

    def _check_piece(self, file: File, pieces: Pieces, number: int, content: bytes) -> bytes:
        """Return the content of a piece; BadFile where it is another one."""
        start, stop = pieces.bounds(number)
        if len(content) != stop - start:
            raise self._bad_file(file.name, f"has fewer bytes than the manifest says ({pieces.num_bytes})")
        if file.verify:
            self._check_sha256(file.name, hashlib.sha256(content).hexdigest(), pieces.sha256[number])
        return content

    def parts(self, file: File) -> list[tuple[str, Folder, File]]:
        """Return the files that a table is made of: what its shards and patients are called by, folder and file."""
        return [("", self, file)]

    @contextmanager
    def _report_missing(self, name: str) -> Iterator[None]:
        """Say of a file that cannot be read why, and whether that is its own fault."""
        try:
            yield
        except OSError as error:
            reason = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
            if error.errno in (errno.ENOENT, errno.EIO):
                raise self._bad_file(name, reason) from None
            raise UserError(f"{self}/{name}: {reason}") from None

    def _check_size(self, name: str, actual: int, expected: int | None) -> None:
        if expected is not None and actual != expected:
            raise self._bad_file(name, f"has {actual} bytes, the manifest says {expected}")

    def _check_sha256(self, name: str, actual: str, expected: str) -> None:
        if actual != expected:
            raise self._bad_file(name, "checksum differs from the manifest's")

    def _bad_file(self, name: str, reason: str) -> BadFile:
        return BadFile(f"{self}/{name}", reason, self.repair_advice)


def as_folder(directory: Path | Folder) -> Folder:
    """Return the folder at a path; a folder is returned as it is."""
    return Folder(directory) if isinstance(directory, Path) else directory
