"""The loader over 100 million patients: memory, seconds to the first batch, waits, seconds to resume.

    python -m benchmarks.groups [--shards 20000] [--file_shards 24] [--groups 4] [--step_ms 4] [--output FILE.json]
    python -m benchmarks.groups --samples 10 --groups 3 --output benchmarks/results/groups_samples.json

Nobody has the 42 thousand million events of so many stays at hand, so there are parts, each a process of its own:

* ``simulated``: a manifest of 20,000 shards of 5,000 patients.  Instead of being read from a file, a shard is drawn
  from (seed, shard) when the loader asks for it, in full size: lengths like those of ICU stays, codes, values.
  Everything above that one function is the loader as it is.
* ``files``: so many of the same shards as real Parquet files, a few groups of them, read and verified.

With ``--samples`` a task has so many samples of each patient.  Its table is real in every part, all rows of it: of ten
samples a patient a thousand million.  Two parts are added:

* ``store``: the simulated shards with manifest and table at a URL, of which each request takes ``--delay_ms`` and
  ``--stream_mb`` MB/s, with a cold cache.
* ``whole_table``: as if the task had no checksums of pieces, so that the table is verified as a whole first; one group.

A training step is simulated by sleeping, over ``--groups`` groups; its wait is what passes until the loader gives a
batch.  Waits at the first step of a group are those in which the next group could have been missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline.loading.store
from benchmarks.machine import describe
from benchmarks.sample_table import NAME, Store, forget_pieces, write_samples
from pipeline.arrays import concatenate_ranges, offsets_from_sizes
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SCHEMA
from pipeline.dataset.shards import FlatPatients, write_shard
from pipeline.loading.loader import make_loader
from pipeline.machine import peak_rss_bytes
from pipeline.sampling.groups import GROUP_EVENTS
from pipeline.schema import INDEX_FILE, MANIFEST_FILE
from pipeline.storage.files import file_sha256

PATIENTS_PER_SHARD = 5000
BATCH_SIZE = 16
NUM_CODES = 40
MAX_EVENTS = 8192  # of a batch, for the price of len() under a budget


def lengths(shard: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[P] events and sets of each patient of a shard, sorted; spread as in ICU stays, 425 events on average."""
    rng = np.random.default_rng([0, shard])
    num_events = np.sort(np.clip(rng.lognormal(5.96, 0.43, PATIENTS_PER_SHARD), 5, 5000).astype(np.int64))
    return num_events, np.maximum(1, (num_events * rng.uniform(0.1, 0.25, PATIENTS_PER_SHARD)).astype(np.int64))


def entry_of(shard: int) -> ShardEntry:
    num_events, num_sets = lengths(shard)
    return ShardEntry(
        path=f"train/{shard:05d}.parquet",
        num_patients=PATIENTS_PER_SHARD,
        num_sets=int(num_sets.sum()),
        num_events=int(num_events.sum()),
        num_bytes=PATIENTS_PER_SHARD,  # no file has this size: the shard is drawn
        sha256="0" * 64,
    )


def drawn_shard(directory: Path, entry: ShardEntry, *, verify: bool = True) -> FlatPatients:
    """In place of ``read_shard``: the patients of a shard out of its number alone."""
    shard = int(Path(entry.path).stem)
    num_events, num_sets = lengths(shard)
    patient_offsets = offsets_from_sizes(num_sets)
    place = concatenate_ranges(np.zeros(len(num_sets), np.int64), num_sets)  # of a set in its patient
    set_sizes = np.repeat(num_events // num_sets, num_sets) + (place < np.repeat(num_events % num_sets, num_sets))
    rng = np.random.default_rng([1, shard])
    return FlatPatients(
        patient_offsets=patient_offsets,
        set_offsets=offsets_from_sizes(set_sizes),
        minute=(place * 30).astype(np.float32),
        code=rng.integers(2, NUM_CODES, entry.num_events, np.int32),
        value=rng.random(entry.num_events, np.float32),
        has_value=np.ones(entry.num_events, np.bool_),
        has_static=np.zeros(PATIENTS_PER_SHARD, np.bool_),
        patient_id=pa.array([f"{shard}-{row}" for row in range(PATIENTS_PER_SHARD)], pa.string()),
    )


def write_files(directory: Path, num_shards: int, samples: int) -> None:
    """The first shards as files, with their manifest and a task of so many samples a patient."""
    entries = []
    for shard in range(num_shards):
        entry = entry_of(shard)
        drawn = drawn_shard(directory, entry)
        by_set = pa.array(drawn.patient_offsets.astype(np.int32))
        by_event = pa.array(drawn.set_offsets[drawn.patient_offsets].astype(np.int32))
        columns = {
            "patient_id": drawn.patient_id,
            "event_minute": pa.nulls(PATIENTS_PER_SHARD, SHARD_SCHEMA.field("event_minute").type),
            "num_events": pa.array(np.diff(by_event.to_numpy())),
            "num_sets": pa.array(np.diff(by_set.to_numpy())),
        }
        for name, offsets, flat in (
            ("minute", by_set, drawn.minute.astype(np.float64)),
            ("set_size", by_set, np.diff(drawn.set_offsets).astype(np.int32)),
            ("code", by_event, drawn.code),
            ("value", by_event, drawn.value),
        ):
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(flat), type=SHARD_SCHEMA.field(name).type)
        table = pa.Table.from_arrays([columns[name] for name in SHARD_SCHEMA.names], schema=SHARD_SCHEMA)
        entries.append(write_shard(table, directory, entry.path))
    write_tables(directory, entries, samples)


def write_manifest(directory: Path, num_shards: int, samples: int) -> None:
    write_tables(directory, [entry_of(shard) for shard in range(num_shards)], samples)


def write_tables(directory: Path, entries: list[ShardEntry], samples: int) -> None:
    """Write the manifest of shards, and their index or a task: what loaders read of either."""
    manifest = Manifest(
        splits={"train": entries},
        files={} if samples else write_index(directory, entries),
        vocabulary_fingerprint="",
        num_codes=NUM_CODES,
        embedding_dim=None,
        options={},
        fingerprint="simulated",
    )
    manifest.save(directory)
    if samples:
        write_samples(directory, manifest, lengths, samples)


def write_index(directory: Path, entries: list[ShardEntry]) -> dict[str, str]:
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in ("shard", "num_events", "num_sets")])
    with pq.ParquetWriter(directory / INDEX_FILE, schema, compression="zstd") as writer:
        for shard, entry in enumerate(entries):
            paths = np.full(PATIENTS_PER_SHARD, entry.path)
            writer.write_table(pa.table([pa.array(paths), *lengths(shard)], names=schema.names).cast(schema))
    return {INDEX_FILE: file_sha256(directory / INDEX_FILE)}


def measure(
    directory: Path, task: str | None, simulated: bool, num_groups: int, step_seconds: float, store: Store | None = None
) -> dict[str, Any]:
    """One loader from its start over some groups of the first epoch, and another that resumes in the last of them."""
    if simulated:
        pipeline.loading.store.read_shard = drawn_shard
    place: Any = directory if store is None else store.open(directory)
    flags: dict[str, Any] = {"task": task, "batch_size": BATCH_SIZE, "prefetch": 4, "fetch_ahead": 0 if store else 4}
    rss_before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    loader = make_loader(place, **flags)
    stream = iter(loader)
    next(stream)
    first_batch = time.perf_counter() - started
    fetched = None if store is None else [store.requests, store.num_bytes]
    grouping = loader._planner.grouping(0)
    num_groups = min(num_groups, grouping.num_groups)

    waits: dict[bool, list[float]] = {True: [], False: []}  # of first steps of a group, and of others
    rss, state, group, after_state = [], {}, 0, []
    middle = (int(grouping.borders[num_groups - 1] + grouping.borders[num_groups]) // 2) // BATCH_SIZE
    while loader.cursor < int(grouping.borders[num_groups]) // BATCH_SIZE:
        time.sleep(step_seconds)
        asked = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - asked
        waits[loader._group.position.number != group].append(waited)
        if loader._group.position.number != group:
            group = loader._group.position.number
            rss.append(psutil.Process().memory_info().rss)
        if loader.cursor == middle:
            state = json.loads(json.dumps(loader.state_dict()))
        elif loader.cursor == middle + 1:
            after_state = batch.patient_id

    full_speed = time.perf_counter()
    count = sum(batch.num_patients for _, batch in zip(range(4000), stream, strict=False))
    full_speed = count / (time.perf_counter() - full_speed)
    stream.close()
    del loader, stream

    loader = make_loader(place, **flags)
    started, worked = time.perf_counter(), time.process_time()
    loader.load_state_dict(state)
    resumed, worked = time.perf_counter() - started, time.process_time() - worked
    stream = iter(loader)
    assert next(stream).patient_id == after_state, "the resumed loader goes on with the next batch"
    first_resumed_batch = time.perf_counter() - started
    stream.close()
    entries = loader.manifest.splits["train"]
    return {
        "patients": sum(entry.num_patients for entry in entries),
        "samples": loader.num_samples,
        "events": sum(entry.num_events for entry in entries),
        "shards": len(entries),
        "groups": grouping.num_groups,
        "batches": len(loader),
        "bytes_of_manifest_and_tables": {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in (directory / MANIFEST_FILE, *sorted(directory.glob("tasks/*")))
        },
        **({} if fetched is None else {"requests_and_bytes_to_first_batch": fetched}),
        "seconds_to_first_batch": round(first_batch, 2),
        "steps_measured": len(waits[True]) + len(waits[False]),
        "groups_measured": num_groups,
        "longest_wait_ms_at_the_first_step_of_a_group": round(1000 * max(waits[True], default=0.0), 1),
        "longest_wait_ms_of_other_steps": round(1000 * max(waits[False]), 1),
        "median_wait_ms": round(1000 * float(np.median(waits[True] + waits[False])), 2),
        "patients_per_second_without_steps": round(full_speed),
        "state_bytes": len(json.dumps(state)),
        "seconds_to_resume": round(resumed, 2),
        "processor_seconds_to_resume": round(worked, 2),
        "seconds_to_first_resumed_batch": round(first_resumed_batch, 2),
        "rss_mib_before_the_loader": rss_before >> 20,
        "rss_mib_at_the_start_of_groups": [one >> 20 for one in rss],
        "peak_rss_mib": peak_rss_bytes() >> 20,
    }


def price_of_len(directory: Path) -> float:
    """Milliseconds a shard that ``len`` takes under a budget of events, for which it reads the index."""
    loader = make_loader(directory, task=None, batch_size=None, max_events=MAX_EVENTS)
    started = time.perf_counter()
    len(loader)
    return 1000 * (time.perf_counter() - started) / (len(loader._planner.entries) - len(loader._group.shards))


def alone(work: Any, *given: Any) -> Any:
    """The result of ``work`` in a process of its own, whose peak is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--file_shards", type=int, default=24)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--step_ms", type=float, default=4.0)
    parser.add_argument("--samples", type=int, default=0, help="of each patient; 0 = no task")
    parser.add_argument("--delay_ms", type=float, default=50.0, help="of each request to the store")
    parser.add_argument("--stream_mb", type=float, default=100.0, help="MB/s of the store")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "groups.json")
    options = parser.parse_args()
    result: dict[str, Any] = {
        **describe(),
        "load_average_at_the_start": round(os.getloadavg()[0], 1),
        "group_events": GROUP_EVENTS,
        "batch_size": BATCH_SIZE,
        "step_ms": options.step_ms,
    }
    for name, num_shards, prepare in (
        ("simulated", options.shards, write_manifest),
        ("files", options.file_shards, write_files),
    ):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            alone(prepare, directory, num_shards, options.samples)
            task, is_simulated, step = NAME if options.samples else None, name == "simulated", options.step_ms / 1000
            result[name] = alone(measure, directory, task, is_simulated, options.groups, step)
            if is_simulated and options.samples:
                store = Store(options.delay_ms / 1000, options.stream_mb * 1e6)
                result["store"] = alone(measure, directory, task, True, 2, step, store)
                forget_pieces(directory)
                result["whole_table"] = alone(measure, directory, task, True, 1, 0.0)
            elif not is_simulated and not options.samples:
                result[name]["len_under_max_events_ms_a_shard"] = round(alone(price_of_len, directory), 1)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
