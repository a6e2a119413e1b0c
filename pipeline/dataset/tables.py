"""The tables of a data set beside its shards: index, vocabulary and embeddings."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.arrays import Ints
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.schemas import INDEX_SCHEMA, VOCABULARY_SCHEMA
from pipeline.schema import EMBEDDINGS_FILE, INDEX_FILE, VOCABULARY_FILE, UserError
from pipeline.storage.folder import Folder, as_folder

LENGTHS = pa.schema([INDEX_SCHEMA.field(name) for name in ("shard", "num_events", "num_sets")])
Lengths = tuple[Ints, Ints]
"""num_events [P] and num_sets [P], int64, of the patients of some shards, one shard after another."""


def read_parquet(path: str | Path, schema: pa.Schema) -> pa.Table:
    """Return a Parquet file with exactly the columns of ``schema``, cast to its types."""
    # In this thread: others gain nothing here, and if memory is short Arrow waits for ever for one it cannot start.
    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False).select(schema.names).cast(schema)


def read_index(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """Return ``index.parquet``, checked against the manifest; columns as in ``INDEX_SCHEMA``."""
    return _read_table(directory, manifest, INDEX_FILE, INDEX_SCHEMA)


def read_vocabulary(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """Return ``vocabulary.parquet``, checked against the manifest; columns as in ``VOCABULARY_SCHEMA``."""
    return _read_table(directory, manifest, VOCABULARY_FILE, VOCABULARY_SCHEMA)


def _read_table(directory: Path | Folder, manifest: Manifest, name: str, schema: pa.Schema) -> pa.Table:
    folder = as_folder(directory)
    with open_checked(folder, manifest, name) as path, _report_damage(folder, name):
        return read_parquet(path, schema)


def load_embeddings(directory: Path | Folder, manifest: Manifest) -> npt.NDArray[np.float32]:
    """Return ``embeddings.npy``, [num_codes, embedding_dim] float32, checked against the manifest."""
    folder = as_folder(directory)
    with open_checked(folder, manifest, EMBEDDINGS_FILE) as path:
        with _report_damage(folder, EMBEDDINGS_FILE):
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)  # allocates nothing for what the header claims
        if vectors.dtype != np.float32 or vectors.shape != (manifest.num_codes, manifest.embedding_dim):
            holds = f"holds {vectors.dtype} {vectors.shape}, the manifest says otherwise"
            raise UserError(f"{folder}/{EMBEDDINGS_FILE}: {holds}; {folder.repair_advice}")
        return np.array(vectors)


@contextmanager
def open_checked(directory: Path | Folder, manifest: Manifest, name: str, *, verify: bool = True) -> Iterator[Path]:
    """Yield a path on this machine of one of ``manifest.files``, while the context lasts.

    With ``verify`` its checksum is compared with the manifest's; only a Folder remembers that it was.
    """
    folder = as_folder(directory)
    if name not in manifest.files:
        raise UserError(f"{folder}/{name}: not in the manifest; run preprocess.py again")
    with folder.local_file(name, manifest.files[name], verify=verify) as path:
        yield path


@contextmanager
def _report_damage(folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, EOFError, pa.ArrowException) as error:
        raise UserError(f"{folder}/{name}: cannot be read ({error}); {folder.repair_advice}") from None


class LengthIndex:
    """The lengths of patients, read from the row groups of ``index.parquet`` that hold the shards in question.

    The file is opened, and its checksum verified, when lengths are first read.
    """

    def __init__(self, directory: Path | Folder, manifest: Manifest, *, verify: bool = True) -> None:
        self._folder, self._manifest, self._verify = as_folder(directory), manifest, verify
        self._metadata: pq.FileMetaData | None = None
        self._shards_of_groups: list[tuple[str, str]] = []  # first and last shard of each row group

    def read(self, entries: Sequence[ShardEntry]) -> Lengths:
        """Return the lengths of the patients of some shards, in the order of ``entries`` and of their rows."""
        paths, folder = [entry.path for entry in entries], self._folder
        with (
            open_checked(folder, self._manifest, INDEX_FILE, verify=self._verify) as local,
            _report_damage(folder, INDEX_FILE),
            pq.ParquetFile(local, metadata=self._metadata) as file,
        ):
            if self._metadata is None:
                self._find_row_groups(file.metadata)
            ordered, groups = sorted(paths), enumerate(self._shards_of_groups)
            wanted = [group for group, (a, b) in groups if bisect_left(ordered, a) < bisect_right(ordered, b)]
            table = file.read_row_groups(wanted, LENGTHS.names, use_threads=False).select(LENGTHS.names).cast(LENGTHS)
        shard = pc.fill_null(pc.index_in(table["shard"], value_set=pa.array(paths, pa.string())), -1).to_numpy()
        order = np.argsort(shard, kind="stable")[np.count_nonzero(shard < 0) :]
        num_events, num_sets = (table[name].to_numpy()[order].astype(np.int64) for name in ("num_events", "num_sets"))
        sums = [np.bincount(shard[order], amount, len(paths)) for amount in (None, num_sets, num_events)]
        claims = [(entry.num_patients, entry.num_sets, entry.num_events) for entry in entries]
        if np.stack(sums, axis=1).tolist() != [list(claim) for claim in claims] or num_sets.min(initial=1) < 1:
            raise UserError(f"{folder}/{INDEX_FILE}: contradicts the manifest; {folder.repair_advice}")
        return num_events, num_sets

    def _find_row_groups(self, metadata: pq.FileMetaData) -> None:
        column = metadata.schema.names.index("shard")
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            has_range = statistics is not None and statistics.has_min_max
            self._shards_of_groups.append((statistics.min, statistics.max) if has_range else ("", "~"))
        self._metadata = metadata
