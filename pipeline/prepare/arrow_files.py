"""Write and read the tables of the work folder, each whole or absent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare.splits import HASH_BITS
from pipeline.storage.files import replace_atomically


def write_table(path: Path, table: pa.Table, max_rows: int | None = None) -> None:
    """Write an Arrow file of one record batch, so that a column is one array, or of batches of ``max_rows``."""
    with replace_atomically(path) as temporary, pa.ipc.new_file(temporary, table.schema) as file:
        file.write_table(table.combine_chunks(), max_rows)


def read_table(path: Path) -> pa.Table:
    """Return an Arrow file, mapped: columns cost memory when they are touched."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def read_partition_slice(path: Path, partition: int, num_partitions: int) -> tuple[pa.Table, pa.Table]:
    """Return, of a table sorted by ``hash``, the rows of a partition and all rows before them."""
    table = read_table(path)
    bounds = [-(-(number << HASH_BITS) // num_partitions) for number in (partition, partition + 1)]
    start, stop = np.searchsorted(table["hash"].to_numpy(), np.array(bounds, dtype=np.uint64))
    return table.slice(start, stop - start), table.slice(0, start)


def read_row_range(path: Path, start: int, stop: int, batch_rows: int) -> pa.Table:
    """Return rows of an Arrow file of batches of ``batch_rows``; each column is one array."""
    first = start // batch_rows
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(first, -(-stop // batch_rows))]
    table = pa.Table.from_batches(batches, reader.schema).slice(start - first * batch_rows, stop - start)
    # A part of a single batch is copied, or it would keep all of the batch in memory, times the number of spills.
    return table.take(np.arange(stop - start)) if len(batches) == 1 else table.combine_chunks()


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables one after the other to a Parquet file compressed with zstd."""
    with replace_atomically(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
