"""The manifest: which shards a data set has, what each holds, and its checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pipeline.schema import FORMAT_VERSION, MANIFEST_FILE, SPLITS, UserError
from pipeline.storage.files import seal, unseal, write_atomically
from pipeline.storage.folder import File, Folder, as_folder
from pipeline.storage.pieces import Pieces

# No other path is opened, or removed, because a manifest names it.
_SHARD_PATH: Final = re.compile(rf"([0-9]+/)?({'|'.join(SPLITS)})/[0-9]+\.(parquet|tar)")

MAX_SHARD_EVENTS: Final = 1 << 31  # patients, sets and events of a shard are counted in 32 bits
MAX_PATIENTS_PER_BYTE: Final = 64  # more than any compression achieves; memory is allocated for as many


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard, as the manifest names it."""

    path: str
    num_patients: int
    num_sets: int
    num_events: int
    num_bytes: int
    sha256: str

    @property
    def data_set(self) -> str:
        """Return ``1/``, ``2/`` … where several data sets are one, which patients are called by too; else nothing."""
        return self.path[: self.path.index("/") + 1] if self.path[0].isdigit() else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of a data directory.  It is written last, so all files that it names are complete.

    Attributes:
        splits: the shards of each split, as training reads them.
        tars: the same shards again as WebDataset tars, if both formats were asked for.
        files: SHA-256 of every other file that training reads, by name.
        pieces: of those of them that are large and read in parts.
        vocabulary_fingerprint: SHA-256 over names, means and stds; a checkpoint holds it and refuses another.
        num_codes: rows of the vocabulary, padding and unknown included.
        embedding_dim: width of ``embeddings.npy``, or None if there are no embeddings.
        fingerprint: SHA-256 over input and options.
    """

    splits: dict[str, list[ShardEntry]]
    files: dict[str, str]
    vocabulary_fingerprint: str
    num_codes: int
    embedding_dim: int | None
    options: dict[str, Any]
    fingerprint: str
    tars: dict[str, list[ShardEntry]] = field(default_factory=dict)
    pieces: dict[str, Pieces] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def all_shards(self) -> list[ShardEntry]:
        """Return the files of shards of all splits, in both formats."""
        return [entry for shards in (self.splits, self.tars) for entries in shards.values() for entry in entries]

    def file(self, name: str, *, verify: bool = True) -> File:
        """Return one of ``files`` as a folder is asked for it; it has no checksum if it is none of them."""
        return File(name, self.files.get(name, ""), verify=verify, pieces=self.pieces.get(name))

    def without(self, paths: Collection[str]) -> Manifest:
        """Return the manifest with the shards at ``paths`` left out of ``splits``."""
        splits = {name: [x for x in entries if x.path not in paths] for name, entries in self.splits.items()}
        return replace(self, splits=splits)

    def save(self, directory: Path) -> None:
        write_atomically(directory / MANIFEST_FILE, self.encode())

    def encode(self) -> bytes:
        return (json.dumps(seal(asdict(self)), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def load(cls, directory: Path | Folder) -> Manifest:
        """Return the manifest of a data directory; UserError where there is none that this program reads."""
        folder = as_folder(directory)
        path = f"{folder}/{MANIFEST_FILE}"
        try:
            content = json.loads(folder.read(MANIFEST_FILE))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                needed = f"format version {version}, this program reads {FORMAT_VERSION}"
                raise UserError(f"{path}: {needed}; run preprocess.py again")
            return cls._parse(unseal(content, path, folder.repair_advice), path, folder.repair_advice)
        except FileNotFoundError:
            raise UserError(f"{path}: no manifest here; {folder.manifest_advice}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as a manifest ({error}); run preprocess.py again") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest of this project ({error}); run preprocess.py again") from None

    @classmethod
    def _parse(cls, content: dict[str, Any], path: str, advice: str) -> Manifest:
        shards = {
            name: {split: [ShardEntry(**entry) for entry in entries] for split, entries in content[name].items()}
            for name in ("splits", "tars")
        }
        pieces = {name: Pieces.parse(each) for name, each in content.get("pieces", {}).items()}
        manifest = cls(**(content | shards | {"pieces": pieces}))
        for entry in manifest.all_shards():
            if not _SHARD_PATH.fullmatch(entry.path):
                raise UserError(f"{path}: names {entry.path!r}, which is no place of a shard; {advice}")
            in_order = 1 <= entry.num_patients <= entry.num_sets <= entry.num_events < MAX_SHARD_EVENTS
            if not in_order or entry.num_patients > MAX_PATIENTS_PER_BYTE * entry.num_bytes:
                raise UserError(f"{path}: {entry.path} cannot hold as much as it says; {advice}")
        return manifest
