"""Memory of a whole training run, after each of its epochs: does a run grow with its epochs?

    python -m benchmarks.run_memory DATA [--preset small] [--epochs 30] [--output FILE.json] [-- TRAIN FLAGS]

``train.py`` runs in a process of its own, validation, the evaluation of the best checkpoint and the report included.
Whenever ``metrics.jsonl`` has another validation, the process's resident memory and its highest so far (VmRSS and
VmHWM of ``/proc/PID/status``) are read; the peak of the whole run is the last VmHWM that was seen before it ended.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, publish, split_flags
from benchmarks.steps import read_run

ROOT = Path(__file__).parent.parent
INTERVAL = 0.05
"""Seconds between two looks at the process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--preset", choices=("small", "reference"), default="small")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments, flags = split_flags(sys.argv[1:])
    options = parser.parse_args(arguments)
    training = ["--data_dir", options.data_dir, "--preset", options.preset, "--max_epochs", str(options.epochs)]
    with tempfile.TemporaryDirectory() as folder:
        rows, peak = watch([*training, *flags], Path(folder) / "run")
        seconds = read_run(Path(folder) / "run")["summary"]["seconds"]
    result = {
        **describe(),
        "preset": options.preset,
        "train_flags": flags,
        "seconds": seconds,
        "epochs": rows,
        "peak_mib": round(peak, 1),
        "peak_over_first_epoch": round(peak / rows[0]["peak_mib"], 3),
        "resident_over_first_epoch": round(rows[-1]["resident_mib"] / rows[0]["resident_mib"], 3),
    }
    publish(result, options.output)


def watch(flags: list[str], run_dir: Path) -> tuple[list[dict[str, float]], float]:
    """Train, and return the memory after each epoch and the peak of the whole run, in MiB."""
    command = [sys.executable, "train.py", "--distill", "0", "--tree_share", "0", *flags, "--output_dir", str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    rows: list[dict[str, float]] = []
    peak, size, log = 0.0, 0, run_dir / "metrics.jsonl"
    while process.poll() is None:
        resident, highest = read_memory(process.pid)
        peak = max(peak, highest)
        if log.exists() and log.stat().st_size != size:
            size = log.stat().st_size
            epochs = len(read_run(run_dir)["valid"])
            rows += [{"resident_mib": resident, "peak_mib": highest}] * (epochs - len(rows))
        time.sleep(INTERVAL)
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(process.stderr.read())
    return rows, peak


def read_memory(pid: int) -> tuple[float, float]:
    """Return the resident memory of a process and its highest so far, in MiB; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    values = {name: text.split()[0] for name, _, text in (line.partition(":") for line in lines) if text.split()}
    resident, highest = (int(values.get(name, 0)) / 1024 for name in ("VmRSS", "VmHWM"))
    return round(resident, 1), round(highest, 1)


if __name__ == "__main__":
    main()
