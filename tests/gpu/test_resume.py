"""A run on a GPU that is killed and resumed ends as the run that was not killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.steps import read_run, read_weights
from benchmarks.synthetic import write_synthetic_data
from tests.gpu.device import DEVICE, gpu_test, on_gpu

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""No run of this test takes as long."""


def start(data: Path, run: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", "--data_dir", str(data), "--output_dir", str(run), "--device", DEVICE]
    command += ["--max_epochs", "4", "--batch_size", "4", "--checkpoint_steps", "3", "--log_steps", "5", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, printed[-2000:]


@gpu_test
def test_save_kill_resume(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    data = write_synthetic_data(tmp_path / "data", num_patients=60, sets=12)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    processes = [start(data, whole), start(data, killed)]  # at the same time: most of it is starting
    deadline = time.monotonic() + SECONDS
    while not (killed / "checkpoints" / "last.pt").exists():
        assert processes[1].poll() is None, processes[1].communicate()[0][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].kill()
    processes[1].communicate()
    assert processes[1].returncode == -signal.SIGKILL
    stopped_at, _ = read_weights(killed)
    finish(processes[0])
    finish(start(data, killed, "--resume"))
    (steps, expected), (resumed_steps, found) = read_weights(whole), read_weights(killed)
    deviation = float((found - expected).norm() / expected.norm())
    record_property("weights", deviation)
    record_property("killed_at_step", stopped_at)
    assert 0 < stopped_at < steps == resumed_steps
    # Atomic additions on a GPU come in any order, and steps carry the last bits on; on the CPU they are the same.
    assert deviation < 1e-3 if on_gpu else deviation == 0
    assert read_run(whole)["summary"]["steps"] == read_run(killed)["summary"]["steps"] == steps
