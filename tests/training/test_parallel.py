"""How many threads a process takes, on quiet and on busy machines; ranks on several machines."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT
from tests.training.runs import QUICK, assert_same, read_summary, run, weights, write_tiny_data
from training import parallel
from training.parallel import World, choose_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cores", "busy", "ranks", "limit", "expected"),
    [
        (4, [0, 0, 0, 0], 1, None, 4),
        (2, [100, 0], 1, None, 1),  # another process is busy: a second thread would wait for it at every operation
        (2, [100, 100], 1, None, 1),
        (4, [100, 0, 0, 0], 1, None, 3),
        (4, [0, 0, 0, 0], 2, None, 2),
        (4, [0, 0, 0, 0], 1, 1, 1),
        (4, [0, 0, 0, 0], 8, None, 1),
    ],
)
def test_threads_are_the_idle_cores_of_this_process(
    cores: int, busy: list[float], ranks: int, limit: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(parallel, "usable_cores", lambda: cores)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(parallel.psutil, "cpu_percent", lambda **_: busy)
    assert choose_threads(None, World(0, ranks, CPU, 0, ranks), limit=limit) == expected


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(None, World(0, 1, CPU)) == 3
    assert choose_threads(7, World(0, 1, CPU)) == 7


def start_torchrun(node: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    """Start PyTorch's launcher as on the first or the second of two machines; each starts two ranks of train.py."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "run"]
    rendezvous += ["--local-addr", "localhost", "--rdzv-conf", f"is_host={int(node == 0)}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", *rendezvous]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "tests.training.runs", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)


def test_two_torchrun_start_one_run(tmp_path: Path) -> None:
    """Launchers that find each other on one port, as on two machines with a common file system; the last step has two
    patients for four ranks.
    """
    data = write_tiny_data(tmp_path / "data")
    arguments = ["--data_dir", str(data), "--output_dir", str(tmp_path / "two"), *QUICK, "--max_epochs", "1"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launchers = [start_torchrun(node, port, *arguments) for node in (0, 1)]
    try:
        errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert run(data, tmp_path / "one", "--max_epochs", "1") == 0
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)
    assert read_summary(tmp_path / "two")["best"]["auroc"] == read_summary(tmp_path / "one")["best"]["auroc"]
