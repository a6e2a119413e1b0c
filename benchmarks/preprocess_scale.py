"""Time and memory of preprocess.py against the size of the input: the one must grow linearly, the other not at all.

    python -m benchmarks.preprocess_scale [--events 1000000 10000000] [--workers 2] [--output FILE.json]

Synthetic stays, from nothing to shards and report; they are made while they are read, so the time holds that as well.
Memory is the sum over the program and its workers of what is resident, looked at every 50 ms; pages that they share
count in each.  With ``--output`` a plot is written beside the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure

from benchmarks.machine import describe
from pipeline.schema import SUMMARY_FILE

ROOT = Path(__file__).parents[1]
EVENTS_PER_PATIENT = 425
INTERVAL = 0.05


def resident(process: psutil.Process) -> int:
    """Bytes of a process and of all below it."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:  # ended while it was looked at
        pass
    return total


def disk(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed while it was looked at
                total += os.stat(os.path.join(directory, name)).st_size
    return total


def measure(arguments: Sequence[str], workers: int, output: Path) -> dict[str, Any]:
    """Run preprocess.py with ``arguments``, and return its time and the memory and disk that it took."""
    command = ["preprocess.py", *arguments, "--workers", str(workers), "--output", str(output)]
    started = looked = time.monotonic()
    running = psutil.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = most_disk = 0
    while running.poll() is None:
        most = max(most, resident(running))
        if time.monotonic() - looked > 1:
            most_disk, looked = max(most_disk, disk(output)), time.monotonic()
        time.sleep(INTERVAL)
    seconds = time.monotonic() - started
    if running.returncode:
        raise SystemExit(f"{command}: exit {running.returncode}")
    summary = json.loads((output / SUMMARY_FILE).read_text())
    return {
        "events": summary["events_in"],
        "seconds": round(seconds, 2),
        "events_per_second": round(summary["events_in"] / seconds),
        "peak_rss_bytes_all_processes": most,
        "peak_rss_bytes_one_process": summary["peak_rss_bytes"],
        "peak_disk_bytes_per_event": round(most_disk / summary["events_in"], 1),
        "data_bytes_per_event": round(disk(output) / summary["events_in"], 2),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    events = [row["events"] for row in rows]
    left.loglog(events, [row["seconds"] for row in rows], marker="o")
    left.set(xlabel="events", ylabel="seconds")
    right.semilogx(events, [row["peak_rss_bytes_all_processes"] / 2**30 for row in rows], marker="o")
    right.set(xlabel="events", ylabel="peak memory of all processes (GiB)", ylim=(0, None))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preprocess.py against size.", allow_abbrev=False)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = []
    for num_events in given.events:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["synthetic", "--num_patients", str(num_events // EVENTS_PER_PATIENT)]
            rows.append(measure(arguments, given.workers, Path(folder) / "data"))
        print("  ".join(f"{name} {number:,}" for name, number in rows[-1].items()), flush=True)
    if given.output:
        result = {"machine": describe(), "workers": given.workers, "rows": rows}
        given.output.write_text(json.dumps(result, indent=1) + "\n")
        plot(rows, given.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
