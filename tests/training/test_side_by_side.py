"""Processes that train models at the same time: what stops one stops all, and nobody is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.schema import UserError
from tests.processes import Command
from training import side_by_side
from training.data import DataOptions
from training.folds import Member
from training.options import RunOptions, TrainOptions
from training.parallel import StopSignal, World

MANIFEST: Any = None
"""What is trained here looks at no data."""


def runs_below(folder: Path, number: int = 2) -> dict[Member, TrainOptions]:
    options = TrainOptions(data=DataOptions(data_dir="data"), run=RunOptions(output_dir=str(folder)))
    return {Member(name=f"model_{seed}", seed=seed): options for seed in range(number)}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def begun(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.begun"))


def wait_until_stopped(options: TrainOptions, _: object, world: World, member: Member) -> int:
    """A run that ends by a signal alone, and says that it has saved its state."""
    folder = Path(options.run.output_dir)
    with StopSignal(world) as stop:
        (folder / f"{member.name}.begun").write_text(str(os.getpid()))
        wait_for(lambda: stop.poll() > 0)
    (folder / f"{member.name}.saved").touch()
    return 128 + stop.poll()


def fail_beside(options: TrainOptions, manifest: Any, world: World, member: Member) -> int:
    """The first run fails when the second has begun."""
    if member.seed == 0:
        wait_for(lambda: bool(begun(Path(options.run.output_dir))))
        raise UserError("--that is wrong")
    return wait_until_stopped(options, manifest, world, member)


def stop_beside(options: TrainOptions, manifest: Any, world: World, member: Member) -> int:
    """The first run stops when the second has begun, as if a signal was for it alone."""
    if member.seed == 0:
        wait_for(lambda: bool(begun(Path(options.run.output_dir))))
        return 128 + signal.SIGINT
    return wait_until_stopped(options, manifest, world, member)


def die_beside(options: TrainOptions, manifest: Any, world: World, member: Member) -> int:
    """The first run is killed when the second has begun."""
    if member.seed == 0:
        wait_for(lambda: bool(begun(Path(options.run.output_dir))))
        os.kill(os.getpid(), signal.SIGKILL)
    return wait_until_stopped(options, manifest, world, member)


def note_world(options: TrainOptions, _: object, world: World, member: Member) -> int:
    place = f"{world.rank} {world.size} {world.local_rank} {world.local_size} {world.name}{os.getpid()}"
    place += f" {world.idle_cores}"
    (Path(options.run.output_dir) / member.name).write_text(place)
    return 0


def train_all(train: side_by_side.Train, runs: dict[Member, TrainOptions]) -> int:
    return side_by_side.train_side_by_side(train, MANIFEST, runs, processes=2, device="cpu")


@pytest.mark.usefixtures("forked")
def test_each_run_is_alone_and_shares_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "count_idle_cores", lambda: 12)
    assert train_all(note_world, runs_below(tmp_path, 5)) == 0
    notes = [(tmp_path / f"model_{seed}").read_text().split() for seed in range(5)]
    assert [note[:2] for note in notes] == [["0", "1"]] * 5
    assert {(note[3], note[6]) for note in notes} == {("2", "12")}
    assert [note[4] for note in notes] == [f"model_{seed}:" for seed in range(5)]
    place_of = {note[5]: note[2] for note in notes}
    assert sorted(place_of.values()) in (["0", "1"], ["0"], ["1"]), "one process may have been quick enough for all"


@pytest.mark.usefixtures("forked")
def test_a_signal_stops_all_and_nothing_more_begins(tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_for(lambda: len(begun(tmp_path)) == 2)
        time.sleep(3 * side_by_side.PERIOD)  # whatever might be given to one that is busy
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert train_all(wait_until_stopped, runs_below(tmp_path, 4)) == 128 + signal.SIGTERM
    thread.join()
    names = [path.stem for path in begun(tmp_path)]
    assert len(names) == 2
    assert sorted(path.stem for path in tmp_path.glob("*.saved")) == names


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("train", "error", "words"),
    [(fail_beside, UserError, "--that is wrong"), (die_beside, ChildProcessError, "lower --parallel_models")],
)
def test_a_run_that_fails_or_is_killed_stops_the_other(
    tmp_path: Path, train: side_by_side.Train, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        train_all(train, runs_below(tmp_path, 3))
    assert [path.name for path in tmp_path.glob("*.saved")] == ["model_1.saved"]


@pytest.mark.usefixtures("forked")
def test_a_run_that_stops_stops_the_other(tmp_path: Path) -> None:
    assert train_all(stop_beside, runs_below(tmp_path, 3)) == 128 + signal.SIGINT
    assert [path.name for path in tmp_path.glob("*.saved")] == ["model_1.saved"]


class Deadly:
    """What ends the process that it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


@pytest.mark.usefixtures("forked")
def test_processes_that_end_before_they_train_are_found(tmp_path: Path) -> None:
    train: Any = Deadly()
    with pytest.raises(ChildProcessError, match=r"model_\d was killed"):
        train_all(train, runs_below(tmp_path, 3))


def train_until_killed(arguments: Sequence[str]) -> int:
    return train_all(wait_until_stopped, runs_below(Path(arguments[0])))


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    command = Command(train_until_killed, tmp_path)
    wait_for(lambda: len(begun(tmp_path)) == 2 and all(path.read_text() for path in begun(tmp_path)))
    command.kill()
    wait_for(lambda: not any(psutil.pid_exists(int(path.read_text())) for path in begun(tmp_path)))
    assert not list(tmp_path.glob("*.saved")), "nobody may write to a folder that a new command goes on with"


@pytest.mark.parametrize(("gpus", "chosen"), [(0, 0), (1, 0), (2, 0), (3, 2), (8, 2)])
def test_gpus_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch, gpus: int, chosen: int) -> None:
    asked = []

    def choose(name: str, local_rank: int) -> torch.device:
        asked.append((name, local_rank))
        return torch.device("cpu")

    def train(options: TrainOptions, _: object, world: World, member: Member) -> int:
        assert world == World(0, 1, torch.device("cpu"), 2, 3, name="model_0: ", idle_cores=4)
        return 7

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(side_by_side, "choose_device", choose)
    monkeypatch.setattr(side_by_side, "exit_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    for task in [*runs_below(Path(), 1).items(), None]:
        ours.send(task)
    side_by_side._work(theirs, train, MANIFEST, World(0, 1, torch.device("meta"), 2, 3, idle_cores=4), "auto")
    assert asked == [("auto", chosen)]
    assert ours.recv() == 7
