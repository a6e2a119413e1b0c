"""The tables of a data set beside its shards: index, vocabulary and embeddings."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.arrays import Ints
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, VOCABULARY_SCHEMA
from pipeline.schema import EMBEDDINGS_FILE, INDEX_FILE, VOCABULARY_FILE, UserError
from pipeline.storage.folder import File, Folder, as_folder

BATCH_ROWS: Final = 1 << 16
"""Maximum number of rows of a table that are read at once, where all are read in parts."""


def read_parquet(path: str | Path, schema: pa.Schema) -> pa.Table:
    """Return a Parquet file with exactly the columns of ``schema``, cast to its types."""
    # In this thread: others gain nothing here, and if memory is short Arrow waits for ever for one it cannot start.
    with pq.ParquetFile(path) as file:
        return file.read(schema.names, use_threads=False).select(schema.names).cast(schema)


def iterate_parquet(path: str | Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield at most ``BATCH_ROWS`` rows of what :func:`read_parquet` returns at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=schema.names, use_threads=False):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def read_index(directory: Path | Folder, manifest: Manifest, *columns: str) -> pa.Table:
    """Return columns of ``index.parquet`` (by default all), checked against the manifest; as in ``INDEX_SCHEMA``."""
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in columns or INDEX_SCHEMA.names])
    return _read_table(directory, manifest, INDEX_FILE, schema)


def iterate_index(directory: Path | Folder, manifest: Manifest, *columns: str) -> Iterator[pa.Table]:
    """Yield some rows of what :func:`read_index` returns at a time."""
    folder, schema = as_folder(directory), pa.schema([INDEX_SCHEMA.field(name) for name in columns])
    with open_checked(folder, manifest, INDEX_FILE) as path, report_damage(folder, INDEX_FILE):
        yield from iterate_parquet(path, schema)


def read_vocabulary(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """Return ``vocabulary.parquet``, checked against the manifest; columns as in ``VOCABULARY_SCHEMA``."""
    return _read_table(directory, manifest, VOCABULARY_FILE, VOCABULARY_SCHEMA)


def _read_table(directory: Path | Folder, manifest: Manifest, name: str, schema: pa.Schema) -> pa.Table:
    folder = as_folder(directory)
    with open_checked(folder, manifest, name) as path, report_damage(folder, name):
        return read_parquet(path, schema)


def load_embeddings(directory: Path | Folder, manifest: Manifest) -> npt.NDArray[np.float32]:
    """Return ``embeddings.npy``, [num_codes, embedding_dim] float32, checked against the manifest."""
    folder = as_folder(directory)
    with open_checked(folder, manifest, EMBEDDINGS_FILE) as path:
        with report_damage(folder, EMBEDDINGS_FILE):
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
    with folder.local_file(File(name, manifest.files[name], verify=verify)) as path:
        yield path


@contextmanager
def report_damage(folder: Folder, name: str) -> Iterator[None]:
    """Turn what reading a damaged table raises into a UserError that names the file."""
    try:
        yield
    except UserError:  # which a piece may raise, and which says what to do
        raise
    except (OSError, ValueError, TypeError, KeyError, EOFError, pa.ArrowException) as error:
        raise UserError(f"{folder}/{name}: cannot be read ({error}); {folder.repair_advice}") from None


class RowsByShard:
    """Reads a table whose rows belong to shards, from the row groups that hold the shards in question.

    The file is opened when rows are first read.  Its checksum is verified then, or that of each piece of a large file
    when the piece is read.
    """

    def __init__(self, folder: Folder, file: File, schema: pa.Schema) -> None:
        """Describe the table ``file``; ``schema`` has the columns to read, ``shard`` among them."""
        self._folder, self._file, self._schema = folder, file, schema
        self._metadata: pq.FileMetaData | None = None
        self._shards_of_groups: list[tuple[str, str]] = []  # first and last shard of each row group

    def read(self, paths: Sequence[str]) -> tuple[pa.Table, Ints]:
        """Return the rows of the shards at ``paths``, one shard after another, and [N] the number of each row's shard.

        The rows of a shard stay in the table's order.
        """
        folder, names = self._folder, self._schema.names
        with (
            folder.open(self._file) as source,
            report_damage(folder, self._file.name),
            pq.ParquetFile(source, metadata=self._metadata) as file,
        ):
            if self._metadata is None:
                self._find_row_groups(file.metadata)
            ordered, groups = sorted(paths), enumerate(self._shards_of_groups)
            wanted = [group for group, (a, b) in groups if bisect_left(ordered, a) < bisect_right(ordered, b)]
            table = file.read_row_groups(wanted, names, use_threads=False).select(names).cast(self._schema)
        shard = pc.fill_null(pc.index_in(table["shard"], value_set=pa.array(paths, pa.string())), -1).to_numpy()
        order = np.argsort(shard, kind="stable")[np.count_nonzero(shard < 0) :]
        return table.take(order), shard[order].astype(np.int64)

    def _find_row_groups(self, metadata: pq.FileMetaData) -> None:
        column = metadata.schema.names.index("shard")
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            has_range = statistics is not None and statistics.has_min_max
            self._shards_of_groups.append((statistics.min, statistics.max) if has_range else ("", "~"))
        self._metadata = metadata


class JoinedRows:
    """Reads a table that consists of several, each of other shards; see :meth:`Folder.parts`."""

    def __init__(self, folder: Folder, file: File, schema: pa.Schema) -> None:
        """Describe the table as :class:`RowsByShard` does."""
        self._parts = [(prefix, RowsByShard(each, own, schema)) for prefix, each, own in folder.parts(file)]

    def read(self, paths: Sequence[str]) -> tuple[pa.Table, Ints]:
        """Return the rows of the shards at ``paths``, as :meth:`RowsByShard.read` does."""
        tables, shards = [], []
        for prefix, rows in self._parts:
            own = np.array([number for number, path in enumerate(paths) if path.startswith(prefix)], np.int64)
            table, shard = rows.read([paths[number].removeprefix(prefix) for number in own])
            tables.append(add_prefix(table, prefix))
            shards.append(own[shard])
        if len(tables) == 1:
            return tables[0], shards[0]
        shard = np.concatenate(shards)
        order = np.argsort(shard, kind="stable")
        return pa.concat_tables(tables).take(order), shard[order]


def add_prefix(table: pa.Table, prefix: str) -> pa.Table:
    """Return a table whose shards and patients are called by names that begin with ``prefix``."""
    for name in {"shard", "patient_id"} & set(table.schema.names) if prefix else ():
        position = table.schema.get_field_index(name)
        named = pc.binary_join_element_wise(prefix, table[name], "")
        table = table.set_column(position, table.schema.field(name), named)
    return table
