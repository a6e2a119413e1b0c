"""Constants of preprocess.py that tell what breaks first: seconds and bytes a patient, a task, a spill that is opened.

    python -m benchmarks.scale_constants [--output FILE.json]

Each is a slope: a small and a larger input, each in a process of its own, and the difference of what they took, by
what the larger has more.  Seconds are those of all cores that worked, but for ``seconds_per_task``, which waits for the
disk too.  Ten minutes; on Linux.  ``benchmarks.scale_costs`` computes with them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import describe
from benchmarks.preprocess_scale import EVENTS_PER_PATIENT
from pipeline.dataset.manifest import Manifest
from pipeline.prepare.build import build
from pipeline.prepare.executors import ExecutionOptions
from pipeline.prepare.gather import MOMENTS, SCALES, gather, locate
from pipeline.prepare.journal import JOURNAL
from pipeline.prepare.merge import merge_spills
from pipeline.prepare.moments import Moments
from pipeline.prepare.options import EVENTS_PER_SHARD, BuildOptions
from pipeline.prepare.publish import WORK
from pipeline.prepare.rules import Rules
from pipeline.prepare.sort import Partition
from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.labels import Labels, read_labels
from pipeline.prepare.sources.listing import Listing
from pipeline.prepare.sources.reading import PIECE_BYTES, ROW_BYTES, Piece, number_rows
from pipeline.prepare.sources.source import Origin, RawRows, Source
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table
from pipeline.prepare.spill import spill_piece
from pipeline.prepare.spill_files import read_partition
from pipeline.prepare.splits import SplitRule
from pipeline.prepare.summary import join_rejects
from pipeline.reports.data_report import write_data_report
from pipeline.schema import LABEL, MANIFEST_FILE, MINUTE, PATIENT_ID, VALUE, VARIABLE
from pipeline.storage.files import file_sha256

ALL_TRAIN = SplitRule(split_fractions=(1.0, 0.0, 0.0))
MERGED_ROWS = 1_600_000
LABELS_A_GROUP = 1 << 16
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Made(Source):
    """Labelled patients of ``num_events`` events, and ``num_bad`` rows more that are rejected; variables take turns."""

    name: ClassVar[str] = "made"

    path: Path = Path("made")
    num_patients: int
    num_events: int = 1
    num_variables: int = 1
    num_bad: int = 0
    patients_per_piece: int = 20_000

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def list_events(self) -> Listing:
        return Listing()

    def find_events(self) -> dict[str, Path]:
        return {}

    def pieces(self) -> list[Piece]:
        starts = range(0, self.num_patients, self.patients_per_piece)
        stops = [min(start + self.patients_per_piece, self.num_patients) for start in starts]
        return [Piece(files=("made",), start=start, stop=stop) for start, stop in zip(starts, stops, strict=True)]

    def read(self, piece: Piece) -> Iterator[RawRows]:
        num_rows = self.num_events + self.num_bad
        patients = pl.Series(PATIENT_ID, [f"patient {number:09d}" for number in range(piece.start, piece.stop)])
        variables = pl.Series(VARIABLE, [f"VARIABLE//{number:06d}" for number in range(self.num_variables)])
        row = np.arange(len(patients) * num_rows)
        minute = row % num_rows
        columns = {
            PATIENT_ID: patients.gather(row // num_rows),
            MINUTE: pl.Series(MINUTE, np.where(minute < self.num_events, minute, np.nan)),
            VARIABLE: variables.gather(row % self.num_variables),
            VALUE: pl.Series(VALUE, row.astype(np.float32)),
        }
        yield RawRows(rows=number_rows(columns))

    def read_labels(self, hide: Hide | None = None) -> Labels:
        schema = pa.schema({PATIENT_ID: pa.string(), LABEL: pa.int8()})
        with (
            tempfile.TemporaryDirectory() as folder,
            pq.ParquetWriter(path := Path(folder) / "l.parquet", schema) as file,
        ):
            for start in range(0, self.num_patients, LABELS_A_GROUP):
                numbers = pl.int_range(start, min(start + LABELS_A_GROUP, self.num_patients), eager=True)
                name = pl.lit("patient ") + pl.col("n").cast(pl.String).str.zfill(9)
                rows = pl.DataFrame({"n": numbers}).select(name.alias(PATIENT_ID), pl.lit(0, pl.Int8).alias(LABEL))
                file.write_table(rows.to_arrow().cast(schema))
            file.close()
            return read_labels(path, hide=hide)


def prepared(source: Source, events_per_shard: int, workers: int, has_report: bool = True) -> Figures:
    """Build, and perhaps report: seconds of the first stage, and of this process before that and after the last stage.

    Also bytes on disk, and the most memory of this process without its workers.
    """
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        started, begun, ended = time.process_time(), 0.0, 0.0
        clock: list[float] = []

        def progress(stage: str, *, done: int, total: int, rows: int) -> None:
            nonlocal begun, ended
            ended = time.process_time()
            begun = begun or ended
            clock.append(time.perf_counter())
            if done == total:
                found.setdefault("first_stage_seconds", clock[-1] - clock[0])
                for folder in ("spills", "sorted", MOMENTS, JOURNAL):
                    found[f"{folder}_bytes"] = max(found.get(f"{folder}_bytes", 0.0), disk(data / WORK / folder))

        options = BuildOptions(split_rule=ALL_TRAIN, events_per_shard=events_per_shard)
        summary = build(source, data, options, execution=ExecutionOptions(workers=workers), progress=progress)
        manifest = Manifest.load(data)
        if has_report:
            write_data_report(data)
        return found | {
            "serial_seconds": begun - started + time.process_time() - ended,
            "shards": len(manifest.all_shards()),
            "events": summary["events_written"],
            "manifest_bytes": (data / MANIFEST_FILE).stat().st_size,
            "peak_bytes": own_peak(),
        }


def opened(num_variables: int, num_pieces: int) -> Figures:
    """Read small partitions from the spills of pieces of full size: one spill under many names."""
    with tempfile.TemporaryDirectory() as name:
        folder = work_folder(name)
        num_patients = PIECE_BYTES // ROW_BYTES // 40
        source = Made(num_patients=num_patients, num_events=40, num_variables=num_variables, patients_per_piece=1 << 30)
        alone(spill_piece, source, source.pieces()[0], 0, BuildOptions(split_rule=ALL_TRAIN), folder)
        (spill,) = (folder / "spills").iterdir()
        started = time.process_time()
        for partition in range(3):
            read_partition([spill] * num_pieces, partition, 10_000)
        return {"seconds": (time.process_time() - started) / 3, "peak_bytes": own_peak()}


def merged(num_spills: int) -> Figures:
    """Merge spills of ``MERGED_ROWS`` rows: one under many names."""
    with tempfile.TemporaryDirectory() as name:
        folder = work_folder(name)
        source = Made(num_patients=MERGED_ROWS // 40, num_events=40, num_variables=40, patients_per_piece=1 << 30)
        alone(spill_piece, source, source.pieces()[0], 0, BuildOptions(split_rule=ALL_TRAIN), folder)
        (spill,) = (folder / "spills").iterdir()
        started = time.process_time()
        merge_spills(folder, 0, [f"spills/{spill.name}"] * num_spills)
        return {"seconds": time.process_time() - started}


def joined(num_bad: int) -> Figures:
    """Join the rejects of a piece of 40,000 patients, of so many rejected rows each."""
    with tempfile.TemporaryDirectory() as name:
        folder = work_folder(name)
        source = Made(num_patients=40_000, num_bad=num_bad, patients_per_piece=1 << 30)
        alone(spill_piece, source, source.pieces()[0], 0, BuildOptions(split_rule=ALL_TRAIN), folder)
        started = time.process_time()
        join_rejects(folder)
        return {"seconds": time.process_time() - started}


def gathered(num_partitions: int) -> Figures:
    """Merge the moments of partitions of 2,000 variables."""
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name) / MOMENTS).mkdir()
        variables = [f"VARIABLE//{number:06d}" for number in range(2000)]
        moments = Moments.measure(variables, np.arange(2000), np.ones(2000, np.float32))
        for number in range(num_partitions):
            moments.save(locate(folder.parent, MOMENTS, number))
        started = time.process_time()
        gather(folder.parent, MOMENTS, 0, num_partitions)
        return {"seconds": time.process_time() - started}


def scheduled_bytes() -> float:
    """Bytes of what a task that sorts is called with."""
    partition = Partition(Path("/project/data/.preprocess"), 0, 1, SplitRule(), Origin())
    return float(len(pickle.dumps((partition, Rules()))))


def gzipped(num_events: int) -> Figures:
    """Read and spill a gzipped CSV."""
    with tempfile.TemporaryDirectory() as name:
        path = work_folder(name) / "events.csv.gz"
        alone(write_events, path, num_events)
        source = Table(path=path)
        for number, piece in enumerate(source.pieces()):
            spill_piece(source, piece, number, BuildOptions(split_rule=ALL_TRAIN), path.parent)
    return {"peak_bytes": own_peak()}


def work_folder(name: str) -> Path:
    for part in ("spills", "merged", "rejects", "data", SCALES):
        (Path(name) / part).mkdir()
    return Path(name)


def write_events(path: Path, num_events: int) -> None:
    """Synthetic stays as a table, gzipped CSV or Parquet."""
    source = Synthetic(num_patients=num_events // 425)
    events = pl.concat(next(source.read(piece)).rows for piece in source.pieces()).drop("file", "row")
    if path.suffix == ".gz":
        events.write_csv(path, compression="gzip")
    else:
        events.write_parquet(path)


def scheduled(num_tasks: int) -> Figures:
    """Tasks that do nothing, on a Dask scheduler and a worker of this process."""
    from distributed import Client, LocalCluster  # noqa: PLC0415

    cluster = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)
    with cluster, Client(cluster) as client:
        executor = client.get_executor(pure=False)
        started = time.process_time()
        for future in [executor.submit(abs, task) for task in range(num_tasks)]:
            future.result()
        return {"seconds": time.process_time() - started}


def hashed(num_bytes: int) -> Figures:
    """A file of random bytes that has just been written."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "bytes"
        path.write_bytes(os.urandom(num_bytes))
        started = time.process_time()
        file_sha256(path)
        return {"seconds": time.process_time() - started}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a new process, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def own_peak() -> float:
    """Bytes of this process, without its children."""
    return 1024.0 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def disk(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def slope(function: Callable[..., Figures], small: Any, large: Any, by: float) -> Figures:
    """Of each figure, by ``by``; not below 0."""
    low, high = alone(function, *small), alone(function, *large)
    print(function.__name__, low, high, flush=True)
    return {name: max(0.0, (high[name] - low[name]) / by) for name in high}


def measure() -> Figures:
    def patients(number: int) -> tuple[Source, int, int]:
        return Made(num_patients=number), EVENTS_PER_SHARD // EVENTS_PER_PATIENT, 2  # as many as a shard has of stays

    def wide(number: int) -> tuple[Source, int, int, bool]:
        source = Made(num_patients=number, num_events=2000, num_variables=2000, patients_per_piece=50)
        return source, 2000, 2, False  # a partition a patient, about; a report reads a few shards, here all

    def many(number: int) -> tuple[Source, int, int, bool]:
        source = Made(num_patients=number, num_events=500, num_variables=20, patients_per_piece=25)
        return source, 500, 2, False  # a partition a patient, about

    def tasks(number: int) -> tuple[Source, int, int]:
        return Made(num_patients=number, patients_per_piece=1), EVENTS_PER_SHARD, 1

    def large(number: int) -> tuple[Source, int, int]:
        return Synthetic(num_patients=number), 1 << 40, 1  # one partition

    of_patient = slope(prepared, patients(2_200_000), patients(4_200_000), 2_000_000)  # above all that is held of any
    of_pairs = slope(prepared, wide(100), wide(1000), 1)
    of_partition = slope(prepared, many(500), many(4500), 1)  # so many that a few MB more of heap matter little
    of_task = slope(prepared, tasks(10), tasks(310), 300)
    of_event = slope(prepared, large(8192), large(24576), 1)
    of_spill = slope(opened, (40, 8), (40, 264), 256)
    of_wide_spill = slope(opened, (10_000, 8), (10_000, 264), 256)
    pairs, events = of_pairs["shards"] * 2000, of_event["events"]
    with tempfile.TemporaryDirectory() as name:
        write_events(path := Path(name) / "events.parquet", 1_000_000)
        input_bytes = path.stat().st_size / pl.scan_parquet(path).select(pl.len()).collect().item()
    return {
        "base_bytes": alone(own_peak),
        "gzip_bytes": alone(gzipped, 20_000_000)["peak_bytes"],
        "gzip_bytes_per_event": slope(gzipped, (20_000_000,), (60_000_000,), 40_000_000)["peak_bytes"],
        "hash_seconds_per_byte": slope(hashed, (1 << 26,), (1 << 29,), (1 << 29) - (1 << 26))["seconds"],
        "input_bytes_per_event": input_bytes,
        "gather_seconds_per_partition_and_variable": slope(gathered, (20,), (320,), 300 * 2000)["seconds"],
        "main_bytes_per_partition": of_partition["peak_bytes"] / of_partition["shards"],
        "main_bytes_per_patient": of_patient["peak_bytes"],
        "main_seconds_per_partition": of_pairs["serial_seconds"] / of_pairs["shards"],
        "main_seconds_per_patient": of_patient["serial_seconds"],
        "merge_seconds_per_event": slope(merged, (4,), (36,), 32 * MERGED_ROWS)["seconds"],
        "moments_bytes_per_partition_and_variable": of_pairs["moments_bytes"] / pairs,
        "manifest_bytes_per_shard": of_pairs["manifest_bytes"] / of_pairs["shards"],
        "scheduler_bytes_per_task": scheduled_bytes(),
        "scheduler_seconds_per_task": slope(scheduled, (500,), (3000,), 2500)["seconds"],
        "sort_bytes_per_event": of_event["peak_bytes"] / events,
        "sort_bytes_per_spill": of_spill["peak_bytes"],
        "sorted_bytes_per_event": of_event["sorted_bytes"] / events,
        "spill_bytes_per_event": of_event["spills_bytes"] / events,
        "seconds_per_reject": slope(joined, (1,), (26,), 25 * 40_000)["seconds"],
        "seconds_per_spill": of_spill["seconds"],
        "seconds_per_spill_and_variable": max(0.0, of_wide_spill["seconds"] - of_spill["seconds"]) / (10_000 - 40),
        "seconds_per_task": of_task["first_stage_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what breaks first.", allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    constants = {name: float(f"{value:.3g}") for name, value in measure().items()}
    result = json.dumps({"machine": describe(), "constants": constants}, indent=1)
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
