"""How many threads a process takes, on quiet and on busy machines; ranks on several machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.runs import assert_same, rank_environments, read_summary, run, start, weights, write_tiny_data
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


def test_two_machines_of_two_ranks_are_one_run(tmp_path: Path) -> None:
    """Four ranks that meet on one port, told what two ``torchrun`` tell them that have a common file system."""
    data = write_tiny_data(tmp_path / "data")
    environments = rank_environments(4, machines=2)
    ranks = [start(data, tmp_path / "two", "--max_epochs", "1", **environment) for environment in environments]
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, errors
    assert run(data, tmp_path / "one", "--max_epochs", "1") == 0
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)
    assert read_summary(tmp_path / "two")["best"]["auroc"] == read_summary(tmp_path / "one")["best"]["auroc"]
