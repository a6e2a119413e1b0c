"""Tiny runs of ``train.py`` for tests: in this process, in another, or stopped at a chosen moment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import train
from tests.data_dirs import make_patients, write_data_dir
from training.checkpoint import Checkpoint

ROOT = Path(train.__file__).parent
QUICK = ["--max_epochs", "2", "--batch_size", "6", "--warmup_steps", "3", "--beta_warmup_steps", "10"]
QUICK += ["--log_steps", "2", "--threads", "1", "--device", "cpu"]


def write_tiny_data(folder: Path) -> Path:
    """26 patients to train on, 12 to validate, 12 to test; sets of 1 to 11 events."""
    splits = {
        name: make_patients(
            [[1 + (7 * i + k) % 11 for k in range(1 + i % 6)] for i in range(count)], seed=seed, prefix=name
        )
        for seed, (name, count) in enumerate({"train": 26, "valid": 12, "test": 12}.items())
    }
    return write_data_dir(folder, splits)


def run(data: Path | str, out: Path, *flags: str, report: bool = False) -> int:
    """A run in this process; its exit code.  Drawing the report takes longer than all else, so few runs do."""
    arguments = ["--data_dir", str(data), "--output_dir", str(out), *QUICK, *flags]
    if report:
        return train.main(arguments)
    with mock.patch.object(train, "write_run_report", lambda folder: folder / "report.html"):
        return train.main(arguments)


def start(data: Path | str, out: Path, *flags: str, program: str | None = None, **environment: str) -> Any:
    """A run in a process of its own; ``program`` is Python code that ends in calling ``train.main()``."""
    arguments = ["--data_dir", str(data), "--output_dir", str(out), *QUICK, *flags]
    command = [sys.executable, *(["-c", program] if program else [str(ROOT / "train.py")]), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_environments(size: int) -> list[dict[str, str]]:
    """What ``torchrun`` tells each of ``size`` processes of one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


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
