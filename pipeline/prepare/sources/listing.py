"""List the files of a folder as data readers of this field do: links are followed, hidden files left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from pipeline.schema import UserError

FileTest: TypeAlias = Callable[[Path], bool]

SEPARATORS: Final = {".csv": ",", ".tsv": "\t", ".psv": "|"}
CODECS: Final = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TABLES: Final = (".parquet", *(suffix + packed for suffix in SEPARATORS for packed in ("", *CODECS)))
"""Endings of the names of tables."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Files below a folder, in order, and those left out because a name on their way begins with ``.`` or ``_``."""

    files: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLES) and path.is_file()


def is_hidden(relative: Path) -> bool:
    """Return whether a name begins with ``.`` or ``_``, as of checkpoints of editors and markers of Spark."""
    return any(part.startswith((".", "_")) for part in relative.parts)


def list_files(top: Path, is_wanted: FileTest) -> Listing:
    """List the wanted files of a folder and its folders; of a file, the file itself.

    Links to folders are followed, each real folder once, folders before links to them, so that loops end.  A link to
    nothing, and a folder that cannot be read, are a UserError: rows would be missing.
    """
    if not top.is_dir():
        return Listing([top] if is_wanted(top) else [])
    listing, seen = Listing(), {os.path.realpath(top)}
    for folder, names, files in os.walk(top, onerror=_refuse, followlinks=True):
        followed = []
        for name in sorted(names, key=lambda name: (os.path.islink(os.path.join(folder, name)), name)):
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                followed.append(name)
        names[:] = followed
        for path in (Path(folder) / name for name in files):
            if path.is_symlink() and not path.exists() and not path.suffix and not is_hidden(path.relative_to(top)):
                raise UserError(f"{path}: a link to nothing; mend it, or remove it")
            if is_wanted(path) and path.is_file():
                (listing.left_out if is_hidden(path.relative_to(top)) else listing.files).append(path)
    listing.files.sort()
    listing.left_out.sort()
    return listing


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or leave it out")


def list_tables(top: Path, is_wanted: FileTest = is_table) -> list[Path]:
    """Return the tables of a folder and its folders; of a file, the file itself."""
    return list_files(top, is_wanted).files if top.is_dir() else [top]
