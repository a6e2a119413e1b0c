"""Training for an hour in one process: does memory grow, are files or threads left open, does throughput fall?

    python -m benchmarks.soak [--minutes 60] [--output FILE.json]

Synthetic patients.  A round is ``train.py --resume`` for two more epochs: batches, validation, checkpoints after
every 20 steps, the best one's evaluation, report.  After each, the process is looked at; the first half of the rounds
warms up and does not count.  Seconds of the processor do not see other work on the machine, patients/s do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

import preprocess
import train
from benchmarks.machine import describe
from pipeline.machine import release_free_memory


def main() -> None:
    parser = argparse.ArgumentParser(description="Train for a long time.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--num_patients", type=int, default=300)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    process, rounds = psutil.Process(), []
    with tempfile.TemporaryDirectory() as name:
        data, run = Path(name) / "data", Path(name) / "run"
        made = ["synthetic", "--num_patients", str(given.num_patients), "--output", str(data), "--workers", "1"]
        assert preprocess.main(made) == 0
        flags = ["--data_dir", str(data), "--output_dir", str(run), "--resume", "--checkpoint_steps", "20"]
        flags += ["--distill", "0", "--tree_share", "0"]
        end = time.monotonic() + 60 * given.minutes
        while time.monotonic() < end:
            before = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                assert train.main([*flags, "--max_epochs", str(2 * len(rounds) + 2)]) == 0
            release_free_memory()
            summary = json.loads((run / "summary.json").read_text())
            kept = sorted(path.name for path in (run / "checkpoints").iterdir())
            assert set(kept) <= {"best.pt", "collapsed.pt", "last.pt"}, kept
            rounds.append(
                {
                    "seconds": round(60 * given.minutes - (end - time.monotonic()), 1),
                    "rss_bytes": process.memory_info().rss,
                    "open_files": process.num_fds(),
                    "threads": threading.active_count(),
                    "processor_seconds": round(time.process_time() - before, 2),
                    "patients_per_second": round(summary["patients_per_second"], 2),
                }
            )
    steady = rounds[len(rounds) // 2 :]
    seconds, rss = (np.array([each[key] for each in steady]) for key in ("seconds", "rss_bytes"))
    (slope, _), covariance = np.polyfit(seconds, rss, 1, cov=True)
    result = {
        "machine": describe(),
        "minutes": given.minutes,
        "rounds": len(rounds),
        "epochs": 2 * len(rounds),
        "steps": summary["steps"],
        "rss_mib_first_last": [round(rss[0] / 2**20, 1), round(rss[-1] / 2**20, 1)],
        "rss_mib_an_hour": round(slope * 3600 / 2**20, 2),
        "rss_mib_an_hour_standard_error": round(float(np.sqrt(covariance[0, 0])) * 3600 / 2**20, 2),
        "open_files_first_last": [steady[0]["open_files"], steady[-1]["open_files"]],
        "threads_first_last": [steady[0]["threads"], steady[-1]["threads"]],
        **{
            f"{name}_first_last_third": [
                round(float(np.median(part)), 2) for part in np.array_split([each[name] for each in steady], 3)[::2]
            ]
            for name in ("patients_per_second", "processor_seconds")
        },
        "each_round": rounds,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "each_round"}, indent=1))
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
