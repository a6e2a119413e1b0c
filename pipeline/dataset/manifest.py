"""The manifest: which shards a data set has, what each holds, and its checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pipeline.schema import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    UserError,
)
from pipeline.storage.files import sealed, unsealed, write_atomically
from pipeline.storage.folder import Folder, folder_at

_SHARD_PATH: Final = re.compile(rf"({'|'.join(SPLITS)})/[0-9]+\.(parquet|tar)")
"""Nothing else is opened, or removed, because a manifest names it."""


MOST_OF_A_SHARD: Final = 1 << 31
"""Patients, sets and events are counted in 32 bits."""


PATIENTS_A_BYTE: Final = 64
"""More than any compression fits; memory for lengths is taken before a shard is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard, as the manifest names it."""

    path: str
    num_patients: int
    num_sets: int
    num_events: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a data directory holds.  Written last: where it is, everything it names was complete.

    Attributes:
        splits: the shards of each split, as training reads them.
        tars: the same shards again as WebDataset tars, where both formats were asked for.
        files: sha256 of every other file that training reads, by name.
        vocabulary_fingerprint: sha256 over names, means and stds; a checkpoint carries it and refuses another.
        num_codes: rows of the vocabulary, padding and unknown included.
        embedding_dim: width of ``embeddings.npy``, or null where the data has none.
        options: what preprocess was asked, resolved.
        fingerprint: sha256 over input and options.
    """

    splits: dict[str, list[ShardEntry]]
    files: dict[str, str]
    vocabulary_fingerprint: str
    num_codes: int
    embedding_dim: int | None
    options: dict[str, Any]
    fingerprint: str
    tars: dict[str, list[ShardEntry]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def shards(self) -> list[ShardEntry]:
        """All files of shards, of all splits and both formats."""
        given = (*self.splits.values(), *self.tars.values())
        return [entry for entries in given for entry in entries]

    def without(self, paths: Collection[str]) -> Manifest:
        """The manifest with the shards at ``paths`` left out of ``splits``."""
        kept = {
            split: [entry for entry in entries if entry.path not in paths] for split, entries in self.splits.items()
        }
        return replace(self, splits=kept)

    def save(self, directory: Path) -> None:
        content = json.dumps(sealed(asdict(self)), indent=1, sort_keys=True)
        write_atomically(directory / MANIFEST_FILE, (content + "\n").encode())

    @classmethod
    def load(cls, directory: Path | Folder) -> Manifest:
        """The manifest of a data directory.

        Raises:
            UserError: there is none, it is damaged, it is not one of ours, or it is of another format version.
        """
        folder = folder_at(directory)
        path = f"{folder}/{MANIFEST_FILE}"
        try:
            text = folder.read(MANIFEST_FILE)
        except FileNotFoundError:
            raise UserError(f"{path}: no manifest here; {folder.begin}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as a manifest ({error}); run preprocess.py again") from None
        try:
            version = content["format_version"]
            if version == FORMAT_VERSION:
                content = unsealed(content, path, folder.mend)
                shards = {
                    name: {split: [ShardEntry(**entry) for entry in entries] for split, entries in given.items()}
                    for name, given in (("splits", content["splits"]), ("tars", content["tars"]))
                }
                manifest = cls(**(content | shards))
                for entry in manifest.shards():
                    if not _SHARD_PATH.fullmatch(entry.path):
                        raise UserError(f"{path}: names {entry.path!r}, which is no place of a shard; {folder.mend}")
                    in_order = 1 <= entry.num_patients <= entry.num_sets <= entry.num_events < MOST_OF_A_SHARD
                    if not in_order or entry.num_patients > PATIENTS_A_BYTE * entry.num_bytes:
                        raise UserError(f"{path}: {entry.path} cannot hold as much as it says; {folder.mend}")
                return manifest
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest of this project ({error}); run preprocess.py again") from None
        raise UserError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}; run preprocess.py again"
        )
