"""Write and read the tables of the work folder, each whole or absent, unless power is lost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare.splits import HASH_BITS
from pipeline.storage.files import replace_atomically

ROWS_A_GROUP: Final = 1 << 16
"""Rows of a row group of a table beside the shards: those of some shards are read without the rest."""

TABLES_HELD: Final = 256
"""Tables that are held as such, or many without rows would take memory."""


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow file of one record batch, so that a column is one array."""
    with replace_atomically(path, is_synced=False) as temporary, pa.ipc.new_file(temporary, table.schema) as file:
        file.write_table(table.combine_chunks())


def read_table(path: Path) -> pa.Table:
    """Return an Arrow file, mapped: columns cost memory when they are touched."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def bound_partition(partition: int, num_partitions: int) -> tuple[int, int]:
    """Return the first hash of a partition, and that of the next."""
    first, last = (-(-(number << HASH_BITS) // num_partitions) for number in (partition, partition + 1))
    return first, last


def load_table(path: Path) -> pa.Table:
    """Return an Arrow file, read into memory: of very many, not all can be mapped at a time."""
    return pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, is_synced: bool = True) -> None:
    """Write tables one after the other to a Parquet file compressed with zstd.

    It has row groups of ``ROWS_A_GROUP`` rows, however the rows are cut into tables; the last has the rest.
    """
    with (
        replace_atomically(path, is_synced=is_synced) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        held, num_rows = [schema.empty_table()], 0
        for table in tables:
            held.append(table)
            num_rows += table.num_rows
            if len(held) == TABLES_HELD:
                held = [pa.concat_tables(held).combine_chunks()]
            if num_rows >= ROWS_A_GROUP:
                rows, num_whole = pa.concat_tables(held), num_rows // ROWS_A_GROUP * ROWS_A_GROUP
                writer.write_table(rows.slice(0, num_whole).combine_chunks(), row_group_size=ROWS_A_GROUP)
                held, num_rows = [rows.slice(num_whole).combine_chunks()], num_rows - num_whole
        if num_rows:
            writer.write_table(pa.concat_tables(held).combine_chunks())
