"""Tasks over shards that are written once: how long adding takes, and how fast their samples are loaded.

    python -m benchmarks.tasks RECORDS [--copies 20] [--tasks 10] [--samples 100000] [--output FILE.json]

RECORDS is a folder of PhysioNet-2012 record files (set A), copied to a MEDS data set as ``benchmarks.preprocess_meds``
does.  Subjects are prepared once; then tasks are added by the command, each in a process of its own, with prediction
times drawn uniformly over stays.  Loaders take turns, and the best round counts: whole patients, and the samples of a
task of 200 samples a subject, in batches of the same number of events.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.machine import describe, publish
from benchmarks.preprocess import prepare, timed
from benchmarks.preprocess_meds import write_meds
from pipeline import make_loader

STAY_MINUTES = 48 * 60
BATCH_EVENTS = 1 << 14


def write_labels(index: pl.DataFrame, path: Path, *, num_samples: int, seed: int) -> None:
    """Labels as MEDS has them, of random subjects at random times of their stays."""
    rng = np.random.default_rng(seed)
    rows = index[rng.integers(index.height, size=num_samples)]
    minutes = pl.Series(rng.integers(0, STAY_MINUTES, num_samples))
    labels = rows.select(
        pl.col("patient_id").cast(pl.Int64).alias("subject_id"),
        (pl.col("time_origin") + pl.duration(minutes=minutes)).alias("prediction_time"),
        pl.Series("boolean_value", rng.random(num_samples) < 0.2),
    )
    labels.unique(["subject_id", "prediction_time"]).write_parquet(path)


def checksums(data: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(data.rglob("*.parquet"))}


def loader_rates(data: Path, rounds: int) -> dict[str, float]:
    """Events a second of loaders over whole patients and over the samples of the task ``many``."""
    rates: dict[str, float] = {}
    for _ in range(rounds):
        for name, task in (("whole patients", None), ("200 samples a subject", "many")):
            loader = make_loader(data, task=task, batch_size=None, max_events=BATCH_EVENTS, prefetch=0)
            next(iter(loader))  # shards are in memory
            loader.set_epoch(1)
            events, started = 0, time.perf_counter()
            for number, batch in enumerate(loader):
                events += batch.num_events
                if number == 500:
                    break
            rates[name] = max(rates.get(name, 0.0), events / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure adding tasks and loading samples.", allow_abbrev=False)
    parser.add_argument("records", type=Path, metavar="RECORDS")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        num_events = write_meds(given.records, given.copies, folder / "meds")
        prepared = prepare(folder / "meds", data)
        index = pl.read_parquet(data / "index.parquet")
        before, seconds, peaks = checksums(data), [], []
        for number in range(given.tasks):
            write_labels(index, folder / "labels.parquet", num_samples=given.samples, seed=number)
            command = ["-m", "pipeline.tasks", "add", str(data), "--name", f"task_{number}"]
            took, peak = timed([*command, "--labels", str(folder / "labels.parquet")])
            seconds.append(took)
            peaks.append(peak)
        few = index.filter(pl.col("split") == "train").head(500)
        write_labels(few, folder / "labels.parquet", num_samples=200 * few.height, seed=0)
        command = [sys.executable, "-m", "pipeline.tasks", "add", str(data), "--name", "many"]
        subprocess.run([*command, "--labels", str(folder / "labels.parquet")], check=True, stdout=subprocess.DEVNULL)
        after = checksums(data)
        result: dict[str, Any] = {
            "machine": describe(),
            "events": num_events,
            "preprocess": prepared,
            "samples_of_a_task": given.samples,
            "seconds_to_add": [round(took, 2) for took in seconds],
            "peak_rss_bytes_to_add": max(peaks),
            "shards_untouched": all(after[path] == digest for path, digest in before.items()),
            "events_per_second_of_loaders": {
                way: round(rate) for way, rate in loader_rates(data, given.rounds).items()
            },
        }
    publish(result, given.output)


if __name__ == "__main__":
    main()
