"""How shards could lie on disk: Parquet, Arrow files, or a local cache of decoded arrays.

    python -m benchmarks.storage DATA [--split train] [--output FILE.json]

Writes the same split as Parquet (what preprocess.py writes), Arrow files uncompressed and with LZ4, and plain arrays
that are mapped into memory, and reads each into the flat arrays from which batches are gathered: without checksums, in
turns, from files that the system has in memory.  The checksum's own time stands beside.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather

from benchmarks.machine import describe, publish
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import read_shard
from pipeline.loading.store import PatientStore

ARRAYS = ("label", "minute", "set_offsets", "code", "value", "has_value")


def read_store(data_dir: Path, entries: Sequence[ShardEntry]) -> PatientStore:
    """Return the patients of some shards in memory."""
    store = PatientStore(data_dir, entries)
    for number in range(len(entries)):
        store.read(number, data_dir, verify=False)
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    entries = Manifest.load(options.data_dir).splits[options.split]
    shards = [options.data_dir / entry.path for entry in entries]
    store = read_store(options.data_dir, entries)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrow: dict[str, list[Path]] = {"uncompressed": [], "lz4": []}
        for number, shard in enumerate(shards):
            for compression, files in arrow.items():
                files.append(folder / f"{number}.{compression}.arrow")
                feather.write_feather(pq.read_table(shard), str(files[-1]), compression=compression)
        for array in ARRAYS:
            np.save(folder / f"{array}.npy", getattr(store, array))

        def of_arrow(files: list[Path]) -> Callable[[], object]:
            return lambda: [decoded(pa.ipc.open_file(pa.memory_map(str(file))).read_all()) for file in files]

        ways: dict[str, tuple[list[Path], Callable[[], object]]] = {
            "Parquet": (shards, lambda: [read_shard(options.data_dir, entry, verify=False) for entry in entries]),
            "Parquet, into the store": (shards, lambda: read_store(options.data_dir, entries)),
            "Arrow, uncompressed": (arrow["uncompressed"], of_arrow(arrow["uncompressed"])),
            "Arrow, LZ4": (arrow["lz4"], of_arrow(arrow["lz4"])),
            "arrays, mapped, each page touched": (
                sorted(folder.glob("*.npy")),
                lambda: [np.load(folder / f"{array}.npy", mmap_mode="r").sum() for array in ARRAYS],
            ),
        }
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(options.rounds):
            for way, (_, read) in ways.items():
                started = time.perf_counter()
                read()
                seconds[way] = min(seconds[way], time.perf_counter() - started)
        started = time.perf_counter()
        for shard in shards:
            hashlib.sha256(shard.read_bytes()).hexdigest()
        checksum = time.perf_counter() - started
        result = {
            **describe(),
            "patients": store.num_patients,
            "events": int(store.set_offsets[-1]),
            "milliseconds": {way: round(1e3 * value, 1) for way, value in seconds.items()},
            "megabytes": {
                way: round(sum(f.stat().st_size for f in files) / 1e6, 1) for way, (files, _) in ways.items()
            },
            "milliseconds_of_sha256": round(1e3 * checksum, 1),
        }
    publish(result, options.output)


def decoded(table: pa.Table) -> list[np.ndarray]:
    """The columns of the shard as arrays, nulls filled as the reader does."""
    names = ("num_sets", "set_size", "minute", "code", "value")
    flat = [table[name].combine_chunks() for name in names]
    flat = [column.flatten() if pa.types.is_list(column.type) else column for column in flat]
    return [column.fill_null(0).to_numpy(zero_copy_only=False) for column in flat]


if __name__ == "__main__":
    main()
