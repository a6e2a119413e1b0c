"""Ranks that are lost, killed or silent, and ranks that leave: what the others do, and what is said."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipeline.dataset.manifest import Manifest
from pipeline.schema import UserError
from tests.processes import Command
from tests.training.runs import rank_environments, run_shortly, start, write_tiny_data
from training import peers
from training.data import DataOptions
from training.options import RunOptions, TrainOptions, check_same_options
from training.parallel import World
from training.peers import ADVICE, PeerWatch, check_restarts, end_with_line

fast = mock.patch.object(peers, "PERIOD", 0.1)
"""A rank is lost after 2.4 seconds, and suspected after half a second."""


def watch(_: Sequence[str]) -> int:
    with fast:
        PeerWatch()
        time.sleep(0.5)
        print("ready", flush=True)
        time.sleep(60)
    return 9


def start_watches(main: Callable[[Sequence[str]], int], *arguments: object) -> list[Command]:
    """Four ranks on two machines."""
    return [Command(main, *arguments, **environment) for environment in rank_environments(4, machines=2)]


def wait_until(condition: Callable[[], bool], ranks: Sequence[Command]) -> None:
    while not condition():
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.02)


WARNING = re.compile(r"^\[W.*?(\n\n|\Z)", re.MULTILINE | re.DOTALL)
"""What PyTorch says, with its stack, of a store that is gone: whether it asks once more then is a matter of time."""


def read_lines(ranks: Sequence[Command], code: int) -> list[str]:
    """The lines that ranks said before they ended with this exit code."""
    errors = [rank.communicate(timeout=30)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), errors
    return [line for error in errors for line in WARNING.sub("", error).splitlines()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("machine", [0, 1])
def test_when_a_machine_is_lost_the_other_says_so_in_one_line(machine: int, number: signal.Signals) -> None:
    """The first machine has the store; a machine that stands still answers no more, as one without a network."""
    ranks = start_watches(watch)
    lost, others = (ranks[:2], ranks[2:]) if machine == 0 else (ranks[2:], ranks[:2])
    try:
        wait_until(lambda: all(rank.read_output() for rank in ranks), ranks)
        for rank in lost:
            rank.send_signal(number)
        said = read_lines(others, 2)
    finally:
        for rank in ranks:
            rank.kill()
    rank, host = (0, "localhost") if machine == 0 else (2, socket.gethostname())
    assert said == [f"train.py: lost rank {rank} of 4, on {host}, so all stop; {ADVICE}"]


def suspect(_: Sequence[str]) -> int:
    """Rank 0 has an error when the last rank has gone; its neighbour, who would miss that one, has none."""
    with fast, mock.patch.object(peers, "MAX_SILENCE", 300):
        watch = PeerWatch()
        time.sleep(1)
        if os.environ["RANK"] == "0":
            watch.await_loss()
        elif os.environ["RANK"] == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(60)
    return 9


def test_a_suspicion_of_one_rank_is_that_of_all() -> None:
    ranks = [Command(suspect, **environment) for environment in rank_environments(3)]
    assert read_lines(ranks[:2], 2) == [f"train.py: lost rank 2 of 3, on {socket.gethostname()}, so all stop; {ADVICE}"]


def leave_one_after_another(_: Sequence[str]) -> int:
    with fast:
        watch = PeerWatch()
        time.sleep(0.5 if os.environ["RANK"] != "0" else 4)  # the first writes a report
        watch.close()
    return 0


def test_who_leaves_is_not_missed() -> None:
    assert read_lines(start_watches(leave_one_after_another), 0) == []


def fail_before_or_after(arguments: Sequence[str]) -> int:
    with fast:
        if os.environ["RANK"] == "3" and arguments[0] == "before":
            end_with_line("train.py: no data here")
            return 2
        PeerWatch()
        if os.environ["RANK"] == "3":
            end_with_line("train.py: no data here")
            return 2
        time.sleep(60)
    return 9


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_ends_one_rank_each_machine_says_once(when: str) -> None:
    assert read_lines(start_watches(fail_before_or_after, when), 2) == ["train.py: no data here"] * 2


def watch_in_child(arguments: Sequence[str]) -> int:
    """Rank 1 is the child of a launcher, which this process is."""
    if os.environ["RANK"] == "1":
        os.environ["TORCHELASTIC_RUN_ID"] = "run"
        if os.fork():
            time.sleep(60)
    return watch(arguments)


def test_the_ranks_of_a_killed_launcher_end() -> None:
    ranks = [Command(watch_in_child, **environment) for environment in rank_environments(2, machines=2)]
    wait_until(lambda: all(rank.read_output() for rank in ranks), ranks)
    ranks[1].kill()
    assert read_lines(ranks[:1], 2) == [f"train.py: lost rank 1 of 2, on {socket.gethostname()}, so all stop; {ADVICE}"]
    assert f"train.py: torchrun was killed on {socket.gethostname()}" in ranks[1].communicate(timeout=30)[1]


def run_with_fast_watch(arguments: Sequence[str]) -> int:
    with fast:
        return run_shortly(arguments)


def test_a_collective_that_fails_is_the_loss_of_a_rank(tmp_path: Path) -> None:
    data, last = write_tiny_data(tmp_path / "data"), tmp_path / "run" / "checkpoints" / "last.pt"
    flags = ["--checkpoint_steps", "1", "--max_epochs", "200"]
    ranks = [
        start(data, tmp_path / "run", *flags, main=run_with_fast_watch, **environment)
        for environment in rank_environments(3, machines=3)
    ]
    wait_until(last.exists, ranks)
    ranks[2].kill()
    lines = [line for line in read_lines(ranks[:2], 2) if not line.startswith(("patients: ", "epoch "))]
    assert lines == [f"train.py: lost rank 2 of 3, on {socket.gethostname()}, so all stop; {ADVICE}"] * 2


def test_machines_with_other_data_or_none_are_told_in_one_line(tmp_path: Path) -> None:
    data, other, runs = write_tiny_data(tmp_path / "data"), tmp_path / "other", {}
    shutil.copytree(data, other)
    manifest = Manifest.load(other)
    shards = [replace(entry, sha256="0" * 64) for entry in manifest.splits["test"]]
    replace(manifest, splits=manifest.splits | {"test": shards}).save(other)
    for name, folder in {"other": other, "none": tmp_path / "none"}.items():
        environments = rank_environments(2, machines=2)
        runs[name] = [
            start(folder if rank else data, tmp_path / f"run_{name}", main=run_with_fast_watch, **environment)
            for rank, environment in enumerate(environments)
        ]
    # torch may say in its own words that the other rank's store is gone.
    said = {name: [each for each in read_lines(ranks, 2) if "train.py: " in each] for name, ranks in runs.items()}
    assert len(said["other"]) == len(said["none"]) == 2
    assert all("not the same data set on all machines (that of rank 1 is not" in line for line in said["other"])
    assert all(line.startswith(f"train.py: {tmp_path}/none/manifest.json: no manifest here") for line in said["none"])
    assert not list(tmp_path.glob("run_*")), "a command that is refused makes no folder"


@pytest.mark.parametrize(
    ("restarts", "is_shared", "is_refused"), [("0", "True", False), ("3", "True", True), ("3", "False", False)]
)
def test_restarts_need_a_store_of_their_own(
    restarts: str, is_shared: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", is_shared)
    refused = pytest.raises(UserError, match=r"--max-restarts 3: .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    with refused if is_refused else nullcontext():
        check_restarts()


def test_ranks_with_other_flags_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, caches and threads are a machine's own."""

    def options(**data: object) -> TrainOptions:
        return TrainOptions(data=DataOptions(**data), run=RunOptions(output_dir="-"))  # type: ignore[arg-type]

    gathered: list[object] = []

    def gather(_: World, item: object) -> list[object]:
        gathered.append(item)
        return gathered

    monkeypatch.setattr(World, "gather", gather)
    world = World(0, 3, torch.device("cpu"))
    check_same_options(options(data_dir="a"), world)
    check_same_options(options(data_dir=("b", "c"), cache_dir="d"), world)
    with pytest.raises(UserError, match="--batch_size differs: 8 on rank 2, 16 on rank 0"):
        check_same_options(options(data_dir="a", batch_size=8), world)
