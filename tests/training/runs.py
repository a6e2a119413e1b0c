"""Tiny runs of ``train.py`` for tests: in this process, in another, or stopped at a chosen moment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

import train
import training.parallel
from tests.data_dirs import make_patients, write_data_dir
from tests.processes import ROOT, Command
from training.checkpoint import Checkpoint

QUICK = ["--max_epochs", "2", "--batch_size", "6", "--warmup_steps", "3", "--beta_warmup_steps", "10"]
QUICK += ["--log_steps", "2", "--threads", "1", "--device", "cpu"]

TRAIN = train.train


def write_tiny_data(folder: Path) -> Path:
    """26 patients to train on, 12 to validate, 12 to test; sets of 1 to 11 events."""
    splits = {
        name: make_patients(
            [[1 + (7 * i + k) % 11 for k in range(1 + i % 6)] for i in range(count)], seed=seed, prefix=name
        )
        for seed, (name, count) in enumerate({"train": 26, "valid": 12, "test": 12}.items())
    }
    return write_data_dir(folder, splits)


@contextmanager
def short_end(*, report: bool = False) -> Iterator[None]:
    """Few resamples and no report, which would take longer than a tiny run."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("training.quality.NUM_RESAMPLES", 20))
        if not report:
            stack.enter_context(mock.patch.object(train, "write_run_report", lambda folder: folder / "report.html"))
        yield


def run(data: Path | str, out: Path, *flags: str, report: bool = False) -> int:
    """A run in this process; its exit code."""
    with short_end(report=report):
        return train.main(["--data_dir", str(data), "--output_dir", str(out), *QUICK, *flags])


def start(
    data: Path | str, out: Path, *flags: str, main: Callable[[Sequence[str]], int] | None = None, **environment: str
) -> Command:
    """A run in a process of its own; ``main`` ends in calling :func:`run_shortly`, and does that by default."""
    return Command(main or run_shortly, "--data_dir", data, "--output_dir", out, *QUICK, *flags, **environment)


def run_shortly(arguments: Sequence[str]) -> int:
    """``train.main`` whose ranks, if it has several, import nothing and end as shortly."""
    with (
        short_end(),
        mock.patch.object(train, "train", _train_shortly),
        mock.patch.object(training.parallel, "LaunchConfig", partial(LaunchConfig, start_method="forkserver")),
    ):
        return train.main(arguments)


def run_and_stall(arguments: Sequence[str]) -> int:
    """A run that saves its state at step 7 and then stands still, as if a step took for ever."""
    step = train.train_step

    def stall(state: Any, *given: Any) -> Any:
        if state.progress.step == 7:
            time.sleep(600)
        return step(state, *given)

    with mock.patch.object(train, "train_step", stall):
        return run_shortly([*arguments, "--checkpoint_steps", "7"])


def _train_shortly(*arguments: Any) -> int:
    with short_end():
        return TRAIN(*arguments)


def start_program(data: Path | str, out: Path, *flags: str) -> subprocess.Popen[str]:
    """``train.py`` as a user starts it, which takes seconds."""
    command = [sys.executable, "train.py", "--data_dir", str(data), "--output_dir", str(out), *QUICK, *flags]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_environments(size: int, machines: int = 1) -> list[dict[str, str]]:
    """What ``torchrun`` tells each of ``size`` processes, on so many machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    local = size // machines
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [(rank, *divmod(rank, local)) for rank in range(size)]
    return [{**common, "RANK": str(r), "GROUP_RANK": str(node), "LOCAL_RANK": str(n)} for r, node, n in ranks]


def weights(out: Path, name: str = "last", which: str = "model") -> dict[str, torch.Tensor]:
    return dict(Checkpoint.load(out / "checkpoints" / f"{name}.pt").state[which])


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor - right[name]).abs().max() <= tolerance, name


def read_summary(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "summary.json").read_text()))


TIMED = ("seconds", "patients_per_second", "events_per_second", "data_wait_fraction", "peak_rss_bytes")


def untimed(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what differs from one run to the next."""
    return {name: value for name, value in summary.items() if name not in TIMED}


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read_folder(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_close(found: Any, expected: Any) -> None:
    """Compare what JSON holds, numbers up to rounding.

    Early answers in the same pass change those at the end by so much: sums of float32 become sums of float64.
    """
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_close(found[name], value)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)


if __name__ == "__main__":  # what torchrun starts in a test
    sys.exit((run_and_stall if "STALL" in os.environ else run_shortly)(sys.argv[1:]))
