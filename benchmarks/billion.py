"""A billion events through preprocess.py: rate, memory and disk, and the same bytes after five kills.

    python -m benchmarks.billion [--events 1000000000] [--workers 2] [--kinds parquet csv] [--kills 5] [--work DIR]
        [--output FILE.json]

Synthetic stays are written as files of 4 million events first, Parquet or CSV; that is not timed.  They are prepared
twice: at first left alone and measured, then killed at moments drawn over the time that this took, and started again
each time (not with ``--kills 0``).  A run over a tenth of the files, before, tells whether memory grows.  A billion
events need some 40 GB of disk as Parquet and 65 GB as CSV, input included, and an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.machine import describe, publish
from benchmarks.preprocess_scale import EVENTS_PER_PATIENT, ROOT, measure
from pipeline.prepare.sources.reading import Piece
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.schema import REPORT_FILE, SUMMARY_FILE

EVENTS_A_FILE = 4_000_000
MAX_BYTES = 2.5 * 2**30
RATE = 2.5e6
"""What the project asks for: bytes of all processes together, and events a second, of two workers."""


def write_input(folder: Path, kind: str, num_events: int, workers: int) -> None:
    """Write synthetic stays of about so many events, patients in files one after another."""
    folder.mkdir(parents=True)
    num_files = max(1, num_events // EVENTS_A_FILE)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_write_file, folder, kind, num_events // num_files), range(num_files)))


def _write_file(folder: Path, kind: str, num_events: int, number: int) -> None:
    size = num_events // EVENTS_PER_PATIENT
    piece = Piece(files=("synthetic",), start=number * size, stop=(number + 1) * size)
    source = Synthetic(num_patients=piece.stop)
    rows = pl.concat(raw.rows for raw in source.read(piece)).drop("file", "row")
    rows = rows.with_columns(pl.col("patient_id").cast(pl.String).str.replace("synthetic-", "p"))
    path = folder / f"{number:05d}.{kind}"
    if kind == "parquet":
        rows.write_parquet(path)
    else:
        whole = pl.col("minute").cast(pl.Int32)
        rows.with_columns(whole, pl.col("value").round(3)).write_csv(path, float_precision=3)


def digest(directory: Path) -> str:
    """Return the sha256 of every file and its path, but for the two that tell of the run itself."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (SUMMARY_FILE, REPORT_FILE):
            with path.open("rb") as file:
                found.update(
                    path.relative_to(directory).as_posix().encode() + hashlib.file_digest(file, "sha256").digest()
                )
    return found.hexdigest()


def kill_again_and_again(arguments: Sequence[str], output: Path, moments: Sequence[float]) -> None:
    """Run to the end, killed so many seconds after each start but the last."""
    for moment in (*moments, None):
        command = [sys.executable, "preprocess.py", *arguments, "--output", str(output)]
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            status = running.wait(moment)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            time.sleep(1)  # its workers end with it
            continue
        if status:
            raise SystemExit(f"{command}: exit {status}")
        return


def measure_kind(kind: str, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Return what preparing the events of files of one kind took."""
    whole, tenth = work / "input", work / "tenth"
    write_input(whole, kind, given.events, given.workers)
    files = sorted(whole.iterdir())
    tenth.mkdir()
    for path in files[: max(1, len(files) // 10)]:
        (tenth / path.name).hardlink_to(path)
    rows = {}
    for name, folder in (("tenth", tenth), ("whole", whole)):
        rows[name] = measure([str(folder)], given.workers, work / f"of_{name}")
        print(kind, name, rows[name], flush=True)
    small, large = (rows[name]["peak_rss_bytes_all_processes"] for name in ("tenth", "whole"))
    result: dict[str, Any] = {
        **rows,
        "memory_by_that_of_a_tenth": round(large / small, 3),
        "within_memory": large <= MAX_BYTES,
        "fast_enough": rows["whole"]["events_per_second"] >= RATE,
    }
    if not given.kills:
        return result
    expected = digest(work / "of_whole")
    shutil.rmtree(work / "of_whole")
    rng = random.Random(0)
    moments = [
        round(rng.uniform(0.1, 0.9) * rows["whole"]["seconds"] / max(given.kills / 2, 1), 1) for _ in range(given.kills)
    ]
    kill_again_and_again([str(whole), "--workers", str(given.workers)], work / "killed", moments)
    same = digest(work / "killed") == expected
    return {**result, "killed_after_seconds": moments, "same_bytes_after_kills": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=("parquet", "csv"), default=["parquet", "csv"])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder on a disk with enough room; default: $TMPDIR")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    results = {}
    for kind in given.kinds:
        with tempfile.TemporaryDirectory(dir=given.work) as name:
            results[kind] = measure_kind(kind, given, Path(name))
    publish({**describe(), "workers": given.workers, "kinds": results}, given.output)


if __name__ == "__main__":
    main()
