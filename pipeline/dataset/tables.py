"""The tables of a data set that are read whole: index, vocabulary and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, VOCABULARY_SCHEMA
from pipeline.schema import (
    EMBEDDINGS_FILE,
    INDEX_FILE,
    VOCABULARY_FILE,
    UserError,
)
from pipeline.storage.folder import Folder, folder_at


def read_parquet(path: str | Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    # In this thread: others win nothing here, and where memory is short Arrow waits for ever for one it cannot start.
    with pq.ParquetFile(path) as file:
        table = file.read(columns=columns, use_threads=False)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return table.select(wanted.names).cast(wanted)


def read_index(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """``index.parquet``, checked against the manifest; columns as in ``INDEX_SCHEMA``."""
    return _read_table(directory, manifest, INDEX_FILE, INDEX_SCHEMA)


def read_vocabulary(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """``vocabulary.parquet``, checked against the manifest; columns as in ``VOCABULARY_SCHEMA``, a row a code."""
    return _read_table(directory, manifest, VOCABULARY_FILE, VOCABULARY_SCHEMA)


def _read_table(directory: Path | Folder, manifest: Manifest, name: str, schema: pa.Schema) -> pa.Table:
    folder = folder_at(directory)
    with checked_file(folder, manifest, name) as path:
        try:
            return read_parquet(path, schema)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{folder}/{name}: cannot be read ({error}); run preprocess.py again") from None


def load_embeddings(directory: Path | Folder, manifest: Manifest) -> npt.NDArray[np.float32]:
    """``embeddings.npy``, [num_codes, embedding_dim], checked against the manifest; a header claims no memory."""
    folder = folder_at(directory)
    with checked_file(folder, manifest, EMBEDDINGS_FILE) as path:
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder}/{EMBEDDINGS_FILE}: cannot be read ({error}); {folder.mend}") from None
        if vectors.dtype != np.float32 or vectors.shape != (manifest.num_codes, manifest.embedding_dim):
            found = f"{vectors.dtype} {vectors.shape}"
            raise UserError(f"{folder}/{EMBEDDINGS_FILE}: holds {found}, the manifest says otherwise; {folder.mend}")
        return np.array(vectors)


@contextmanager
def checked_file(directory: Path | Folder, manifest: Manifest, name: str) -> Iterator[Path]:
    """A path on this machine of one of ``manifest.files``, while the context lasts; it has the manifest's checksum."""
    folder = folder_at(directory)
    if name not in manifest.files:
        raise UserError(f"{folder}/{name}: not in the manifest; run preprocess.py again")
    with folder.file(name, manifest.files[name]) as path:
        yield path
