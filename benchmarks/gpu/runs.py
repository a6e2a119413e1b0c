"""Start ``train.py`` as a user does, for a limited time."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.steps import read_run

ROOT = Path(__file__).parents[2]
SKIPPED_LINES = 2
"""Lines of ``metrics.jsonl`` at the start of a run whose steps are still warming up."""

SECONDS_TO_STOP = 12.0
"""Time from the signal to the end of a part: the run saves and ends in 10 s, or is killed."""


ENDED_WELL = (0, 128 + signal.SIGTERM)
"""Exit codes of a run that ended by itself or saved and stopped when it was told to."""


def run_training(
    flags: Mapping[str, object], run_dir: Path, seconds: float, *, max_lines: int | None = None
) -> dict[str, Any]:
    """Run ``train.py`` for at most ``seconds``, then stop it with SIGTERM, after which it saves and ends.

    Args:
        flags: Its command line, without ``--output_dir``.
        run_dir: Output directory of the run.
        seconds: Time limit.
        max_lines: Number of training lines in ``metrics.jsonl`` that suffice; the run is stopped when they are there.

    Returns:
        ``flags``, ``exit_code``, ``stopped_by`` (why it was stopped, or None), ``wall_seconds``, ``printed`` (the last
        lines), ``steps`` (as logged), medians of ``patients_per_second`` and ``data_wait_fraction`` over the log lines
        after the first, ``valid`` (metrics of the last validation) and ``summary``; what the run did not come to is
        None or empty.
    """
    command = [sys.executable, "train.py", "--output_dir", str(run_dir)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word != "True"]
    started, stopped_by = time.monotonic(), None
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and stopped_by is None:
            time.sleep(0.1)
            if time.monotonic() - started > seconds:
                stopped_by = "time limit"
            elif max_lines is not None and len(read_run(run_dir)["train"]) >= max_lines:
                stopped_by = f"{max_lines} log lines suffice"
        if stopped_by is not None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS_TO_STOP - 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.seek(0)
        printed = output.read().splitlines()
    run = read_run(run_dir)
    lines = run["train"][SKIPPED_LINES:] or run["train"]
    medians = {
        name: statistics.median(line[name] for line in lines) if lines else None
        for name in ("patients_per_second", "data_wait_fraction")
    }
    return {
        "flags": {name: str(value) for name, value in flags.items()},
        "exit_code": process.returncode,
        "stopped_by": stopped_by,
        "wall_seconds": time.monotonic() - started,
        "printed": printed[-5:],
        "steps": run["train"][-1]["step"] if run["train"] else None,
        **medians,
        "valid": run["valid"][-1] if run["valid"] else None,
        "summary": run["summary"],
    }
