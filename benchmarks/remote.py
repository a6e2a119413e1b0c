"""Training from a disk beside training from a store that is 50 ms away, with a cold cache: seconds and waiting.

    python -m benchmarks.remote [--rounds 3] [--patients 4000] [--shard_patients 400] [--delay_ms 50]
        [--stream_mb 100] [--fetch_ahead 4 0] [--output FILE.json] [-- TRAIN FLAGS]

``train.py`` runs one epoch over made-up patients, as many and as long as those of PhysioNet 2012 set A (200 steps of 16
patients), in turn from the folder and from the store, each time with a new cache.  Rounds alternate, so that what else
the machine does falls on all; medians are compared.  Store and proxy (``benchmarks/slow_store.py``) use cores of the
same machine, which a store far away would not: on few cores the figures of the store are too high rather than too low.

Of each way:

* ``run_seconds``: the whole command: imports, moments of features, training, validation and test.
* ``epoch_seconds``: its steps, the wait for the first batch included, and ``first_wait_seconds`` that wait.  Moments of
  features are taken of up to 20,000 patients before the first step, so the shards of these are there by then.
* ``wait_share``: the share of ``epoch_seconds`` in which the thread that trains had no batch.
* ``slower``: epoch and run over those of the disk, less 1; the aim is at most 0.05.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, publish, split_flags
from benchmarks.slow_store import serve_slowly
from benchmarks.steps import read_run
from benchmarks.synthetic import write_synthetic_data

ROOT = Path(__file__).parents[1]
TRAIN = ["--max_epochs", "1", "--distill", "0", "--tree_share", "0", "--preset", "small", "--log_steps", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=4000)
    parser.add_argument("--shard_patients", type=int, default=400)
    parser.add_argument("--delay_ms", type=float, default=50, help="before each answer of the store")
    parser.add_argument("--stream_mb", type=float, default=100, help="MB/s of each stream")
    parser.add_argument("--fetch_ahead", type=int, nargs="+", default=[4, 0], help="values compared")
    parser.add_argument("--output", type=Path)
    arguments, flags = split_flags(sys.argv[1:])
    options = parser.parse_args(arguments)
    slow = {"delay": options.delay_ms / 1000, "bytes_per_second": options.stream_mb * 1e6}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_synthetic_data(folder / "data", num_patients=options.patients, shard_size=options.shard_patients)
        shards = [path.stat().st_size for path in data.glob("*/*.parquet")]
        with serve_slowly(data, **slow) as (url, environment):
            ways: dict[str, list[str]] = {"disk": [str(data)]}
            ways |= {
                f"store, --fetch_ahead {ahead}": [url, "--fetch_ahead", str(ahead)] for ahead in options.fetch_ahead
            }
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for number in range(options.rounds):
                for position, (way, where) in enumerate(ways.items()):
                    place = folder / f"{number}_{position}"
                    command = [*where, "--cache_dir", str(place / "cache"), "--output_dir", str(place / "run"), *flags]
                    runs[way].append(measure_training(command, place / "run", environment))
    medians = {
        way: {name: statistics.median(run[name] for run in of_way) for name in of_way[0]}
        for way, of_way in runs.items()
    }
    for way in medians.values():
        way["epoch_slower"] = way["epoch_seconds"] / medians["disk"]["epoch_seconds"] - 1
        way["run_slower"] = way["run_seconds"] / medians["disk"]["run_seconds"] - 1
    result = {
        **describe(),
        **{name: getattr(options, name) for name in ("rounds", "patients", "shard_patients", "delay_ms", "stream_mb")},
        "shards": len(shards),
        "megabytes": round(sum(shards) / 1e6, 1),
        "train_flags": flags,
        "ways": {way: {name: round(value, 4) for name, value in of_way.items()} for way, of_way in medians.items()},
    }
    publish(result, options.output)


def measure_training(flags: list[str], run_dir: Path, environment: dict[str, str]) -> dict[str, float]:
    """Train for an epoch and return how long that took and how much of it was waiting."""
    started = time.perf_counter()
    command = [sys.executable, "train.py", "--data_dir", *flags, *TRAIN]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    run_seconds, steps = time.perf_counter() - started, read_run(run_dir)["train"]
    ends = [step["seconds"] for step in steps]
    waits = [
        step["data_wait_fraction"] * (end - start) for step, start, end in zip(steps, [0, *ends], ends, strict=False)
    ]
    first, share = waits[0], sum(waits) / ends[-1]
    return {"epoch_seconds": ends[-1], "run_seconds": run_seconds, "first_wait_seconds": first, "wait_share": share}


if __name__ == "__main__":
    main()
