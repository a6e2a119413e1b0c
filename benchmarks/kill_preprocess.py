"""SIGKILL at random moments, started again each time: the output must be that of a run left alone, byte for byte.

    python -m benchmarks.kill_preprocess [--kills 20] [--num_patients 12000] [--workers 2] [--output FILE.json]

Synthetic patients, several pieces and partitions.  A moment is drawn over the time that a whole run takes.  When a run
comes to its end between two kills, its output is compared and the next one begins from nothing.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, publish
from pipeline.schema import REPORT_FILE, SUMMARY_FILE

ROOT = Path(__file__).parents[1]


def content(directory: Path) -> dict[str, bytes]:
    """Every file by its path, but for the two that tell of the run itself."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in (SUMMARY_FILE, REPORT_FILE)]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill preprocess.py again and again.", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num_patients", type=int, default=12_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rng = random.Random(given.seed)

    def start(output: Path) -> subprocess.Popen[bytes]:
        options = ["--num_patients", str(given.num_patients), "--workers", str(given.workers)]
        command = [sys.executable, "preprocess.py", "synthetic", *options, "--events_per_shard", "500000"]
        return subprocess.Popen(
            [*command, "--shard_format", "both", "--output", str(output)], cwd=ROOT, stdout=subprocess.DEVNULL
        )

    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        started = time.monotonic()
        assert start(whole).wait() == 0
        seconds = time.monotonic() - started
        kills = 0
        outputs: list[Path] = [Path(name) / "0"]
        moments: list[float] = []
        while True:
            run = start(outputs[-1])
            moment = rng.uniform(0, seconds) if kills < given.kills else None
            try:
                status = run.wait(moment)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                status = run.wait()  # one that had just ended keeps its own
            if status == -signal.SIGKILL:
                kills += 1
                moments.append(round(moment or 0, 2))
                continue
            assert status == 0, f"exit {status} after kills at {moments}"
            assert content(outputs[-1]) == content(whole), f"another output after kills at {moments}"
            if kills == given.kills:
                break
            outputs.append(Path(name) / str(len(outputs)))
    result = {
        "machine": describe(),
        "kills": kills,
        "seconds_into_the_run": moments,
        "seconds_of_a_whole_run": round(seconds, 2),
        "outputs_compared": len(outputs),
        "byte_identical": True,
    }
    publish(result, given.output)


if __name__ == "__main__":
    main()
