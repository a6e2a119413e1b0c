"""A folder with the files of a data set; each is compared with the manifest when it is first read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.schema import UserError
from pipeline.storage.files import file_sha256


class BadFile(UserError):
    """A file is missing, or is not what the manifest says.

    Attributes:
        reason: which of it, and how.
    """

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(f"{where}: {reason}; {advice}")
        self.reason = reason


class Folder:
    """The data directory at a path of this machine; one elsewhere is a ``pipeline.storage.remote.RemoteFolder``.

    It remembers which files it has found whole, for one process; another opens a folder of its own.
    """

    mend = "copy the data set again, or run preprocess.py again"
    """What to do about a bad file."""

    begin = "run preprocess.py (again) first"
    """What to do where there is no manifest."""

    def __init__(self, path: str | Path) -> None:
        self._at = str(path)
        self._whole: set[tuple[str, str]] = set()

    def __str__(self) -> str:
        return self._at

    def read(self, name: str) -> bytes:
        """The content of a small file as it is now; OSError where it cannot be read."""
        return (Path(self._at) / name).read_bytes()

    @contextmanager
    def file(self, name: str, sha256: str, *, num_bytes: int | None = None, verify: bool = True) -> Iterator[Path]:
        """A path on this machine under which the file lies while the context lasts.

        Args:
            name: of the file, below the folder.
            sha256: as the manifest has it.
            num_bytes: as the manifest has it; None where it does not say.
            verify: compare both with the file, the first time.

        Raises:
            BadFile: it is missing, damaged or another.
            UserError: it cannot be read, which need not be the file's fault.
        """
        path = Path(self._at) / name
        if verify and (name, sha256) not in self._whole:
            try:
                self._check_size(name, path.stat().st_size, num_bytes)
                self._check_sum(name, file_sha256(path), sha256)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise self._bad(name, "is missing") from None
                reason = f"cannot be read ({error.strerror})"
                if error.errno == errno.EIO:
                    raise self._bad(name, reason) from None
                raise UserError(f"{self}/{name}: {reason}") from None
            self._whole.add((name, sha256))
        yield path

    def _check_size(self, name: str, found: int, expected: int | None) -> None:
        if expected is not None and found != expected:
            raise self._bad(name, f"has {found} bytes, the manifest says {expected}")

    def _check_sum(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            raise self._bad(name, "checksum differs from the manifest's")

    def _bad(self, name: str, reason: str) -> BadFile:
        return BadFile(f"{self}/{name}", reason, self.mend)


def folder_at(directory: Path | Folder) -> Folder:
    """The folder itself, or that of a path."""
    return Folder(directory) if isinstance(directory, Path) else directory
