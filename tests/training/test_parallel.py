"""How many threads a process takes, on quiet and on busy machines; ranks on several machines."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.processes import ROOT
from tests.training.runs import (
    QUICK,
    assert_same,
    rank_environments,
    read_metrics,
    read_summary,
    run,
    start,
    untimed,
    weights,
    write_tiny_data,
)
from training import parallel
from training.checkpoint import Checkpoint
from training.parallel import World, choose_threads
from training.peers import ADVICE

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


def test_a_run_beside_others_has_its_share_of_the_cores_that_were_idle_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 16)
    monkeypatch.setattr(parallel, "count_idle_cores", lambda: 8)  # the run beside this one has taken the others
    assert choose_threads(None, World(0, 1, CPU, 1, 2, idle_cores=16)) == 8
    assert choose_threads(None, World(0, 1, CPU, 1, 2, idle_cores=8)) == 4
    assert choose_threads(None, World(0, 1, CPU, 1, 2)) == 4


def test_ranks_of_a_machine_share_work_and_runs_beside_one_another_do_not() -> None:
    assert World(3, 4, CPU, 1, 2).own_part(list(range(5))) == [1, 3]
    assert World(0, 1, CPU, 1, 2).own_part(list(range(5))) == list(range(5))


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(None, World(0, 1, CPU)) == 3
    assert choose_threads(7, World(0, 1, CPU)) == 7


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def start_torchrun(node: int, port: int, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start PyTorch's launcher as on the first or the second of two machines; each starts two ranks of train.py."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "run"]
    rendezvous += ["--local-addr", "localhost", "--rdzv-conf", f"is_host={int(node == 0)}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", *rendezvous]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environment}
    command = [*launcher, "-m", "tests.training.runs", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)


@contextmanager
def killed_at_end(launchers: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for launcher in launchers:
            kill_node(launcher)
            launcher.wait()
            assert launcher.stderr is not None
            launcher.stderr.close()


def kill_node(launcher: subprocess.Popen[str]) -> None:
    """Kill a launcher and its ranks, in this order, as a machine that dies takes all."""
    ranks = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    for process in [launcher, *ranks]:
        process.kill()


def test_two_torchrun_start_one_run(tmp_path: Path) -> None:
    """Launchers that find each other on one port, as on two machines, with a folder for the run that both see and each
    with its own copy of the data; the last step has two patients for four ranks.
    """
    data, port = write_tiny_data(tmp_path / "data"), find_free_port()
    copies = [data, shutil.copytree(data, tmp_path / "copy")]
    flags = ["--output_dir", tmp_path / "two", *QUICK, "--max_epochs", "1"]
    launchers = [start_torchrun(node, port, "--data_dir", copies[node], *flags) for node in (0, 1)]
    with killed_at_end(launchers):
        errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert run(data, tmp_path / "one", "--max_epochs", "1") == 0
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)
    assert read_summary(tmp_path / "two")["best"]["auroc"] == read_summary(tmp_path / "one")["best"]["auroc"]


def test_a_killed_machine_ends_the_other_and_one_machine_goes_on(tmp_path: Path) -> None:
    """The machine that dies is that of the rendezvous."""
    data, out, port = write_tiny_data(tmp_path / "data"), tmp_path / "run", find_free_port()
    last = out / "checkpoints" / "last.pt"
    flags = ["--data_dir", data, "--output_dir", out, *QUICK]
    launchers = [start_torchrun(node, port, *flags, STALL="1") for node in (0, 1)]
    with killed_at_end(launchers):
        while not last.exists() or Checkpoint.load(last).step < 7:
            assert launchers[0].poll() is None
            time.sleep(0.1)
        kill_node(launchers[0])
        _, said = launchers[1].communicate(timeout=30)
    assert launchers[1].returncode
    lines = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert lines == [f"train.py: lost rank 0 of 4, on localhost, so all stop; {ADVICE}"]
    assert "training/" not in said, "no traceback but that of the launcher"
    ranks = [start(data, out, "--resume", **environment) for environment in rank_environments(2)]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert run(data, tmp_path / "whole") == 0
    assert_same(weights(out), weights(tmp_path / "whole"), 1e-5)
    ends = [untimed(read_summary(folder)) for folder in (out, tmp_path / "whole")]
    assert ends[0]["steps"] == ends[1]["steps"] == 10
    assert ends[0]["best"]["auroc"] == ends[1]["best"]["auroc"]
    steps = [[(line["kind"], line["step"]) for line in read_metrics(folder)] for folder in (out, tmp_path / "whole")]
    assert steps[0] == steps[1]
