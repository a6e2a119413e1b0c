"""Write the shards of a sorted partition, with the vocabulary's codes and scaled values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.dataset.lists import to_lists
from pipeline.dataset.manifest import ShardEntry
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SCHEMA
from pipeline.dataset.shards import write_shard
from pipeline.prepare.arrow_files import read_table, write_table
from pipeline.schema import FLOAT32_MAX, SPLITS, UNKNOWN_CODE

VOCABULARY: Final = "vocabulary.arrow"


@dataclass(frozen=True, slots=True)
class WrittenPartition:
    """The written shards of a partition."""

    shards: dict[str, list[ShardEntry]]  # by split, one for each file format
    num_events: int


def write_partition(work: Path, partition: int, suffixes: Sequence[str]) -> WrittenPartition:
    """Write one shard of each split below ``data``, as one file for each of ``suffixes``.

    The vocabulary is that of ``vocabulary.arrow`` in the work folder.
    Its rows of the index go to ``index/<split>-<partition>.arrow``, and name the shard of the first suffix.
    """
    table, vocabulary = read_table(work / "sorted" / f"{partition:05d}.arrow"), read_table(work / VOCABULARY)
    variables = json.loads(table.schema.metadata[b"variables"])
    code_of = dict(zip(vocabulary["variable"].to_pylist(), range(vocabulary.num_rows), strict=True))
    codes = np.array([code_of.get(variable, UNKNOWN_CODE) for variable in variables], dtype=np.int32)
    shards: dict[str, list[ShardEntry]] = {}
    for number, split in enumerate(SPLITS):
        rows = table.filter(pa.array(table["split_number"].to_numpy() == number))
        if not rows.num_rows:
            continue
        shard = _encode(rows, codes, vocabulary)
        paths = [f"{split}/{partition:05d}{suffix}" for suffix in suffixes]
        shards[split] = [write_shard(shard, work / "data", path) for path in paths]
        place = {"split": pa.repeat(split, rows.num_rows), "shard": pa.repeat(paths[0], rows.num_rows)}
        columns = dict(zip(rows.column_names, rows.columns, strict=True)) | place
        index = pa.table(columns | {"position": np.arange(rows.num_rows)}).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        write_table(work / "index" / f"{split}-{partition:05d}.arrow", index)
    return WrittenPartition(shards, sum(entries[0].num_events for entries in shards.values()))


def _encode(rows: pa.Table, codes: npt.NDArray[np.int32], vocabulary: pa.Table) -> pa.Table:
    """Return sorted rows as ``SHARD_SCHEMA``; ``codes`` [V] are those of the partition's variables."""
    code, value = codes[_flatten(rows, "code")], _flatten(rows, "value")
    if (code == UNKNOWN_CODE).any():  # their events stand where their names would
        set_sizes = _flatten(rows, "set_size")
        minute = np.zeros(len(code))
        has_minutes = np.repeat(rows["event_minute"].is_valid().to_numpy(), rows["num_events"].to_numpy())
        minute[has_minutes] = np.nan_to_num(_flatten(rows, "event_minute"), nan=-np.inf)
        order = np.lexsort((code, minute, np.repeat(np.arange(len(set_sizes)), set_sizes)))
        code, value = code[order], value[order]
    scaled = (value - vocabulary["mean"].to_numpy()[code]) / vocabulary["std"].to_numpy()[code]
    columns = {
        **{name: rows[name] for name in SHARD_SCHEMA.names},
        "code": to_lists(rows["num_events"].to_numpy(), code),
        "value": to_lists(rows["num_events"].to_numpy(), scaled.clip(-FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)),
    }
    return pa.table(columns).cast(SHARD_SCHEMA)


def _flatten(rows: pa.Table, name: str) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat
