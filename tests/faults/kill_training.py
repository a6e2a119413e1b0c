"""SIGKILL at random moments of training, resumed each time: the end must be that of a run left alone, to the bit.

    python -m tests.faults.kill_training [--kills 50] [--ranks 1] [--patients 48] [--seed 0]

A run is killed after a random time, or by itself at a random call inside validation, while a file is saved, or in the
first step after it began or was resumed.  Weights of ``last.pt`` and ``best.pt`` and ``summary.json`` without its
timings are compared.  This process imports everything and forks the ranks, so that a start costs no seconds.  Of two
ranks one is killed, and the other must end by itself within 30 seconds.  Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure  # imported here, not in each fork
import sklearn.calibration
import sklearn.metrics
import torch

import train
import training.step
import training.validation
from tests.data_dirs import make_patients, write_data_dir
from tests.pages import draw_nothing
from tests.training.runs import assert_same, read_summary, short_end, untimed, weights
from training.checkpoint import Checkpoint

FLAGS = [
    f"--{word}" for word in ["max_epochs=3", "batch_size=6", "warmup_steps=3", "beta_warmup_steps=10", "log_steps=1"]
]
MAX_WAIT = 30.0
"""Seconds within which the other ranks end after one was killed."""

IMPORTED = (matplotlib.figure, sklearn.calibration, sklearn.metrics)


@dataclass(frozen=True)
class Moment:
    """A call at which a process kills itself: the ``number``-th of ``owner.name``, before it or after it."""

    owner: Any
    name: str
    number: int
    after: bool

    def arm(self) -> None:
        """Replace the function by one that kills this process at the moment."""
        function, calls = getattr(self.owner, self.name), 0

        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            number = calls
            if number == self.number and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if number == self.number and self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.name, counting)


MOMENTS: dict[str, tuple[list[tuple[Any, str]], int]] = {
    "validation": ([(training.validation, "compute_losses"), (training.validation, "rank_predictions")], 3),
    "saving": ([(os, "fsync"), (os, "replace")], 20),
    "first step": ([(training.step, "forward_losses"), (training.step, "update_ema"), (train, "train_step")], 1),
}
"""Functions that a process dies in, and the most calls that it makes of them before, by the kind of the moment."""

ANY_TIME = "any time"


def draw_moment(kind: str, rng: random.Random) -> Moment:
    functions, max_number = MOMENTS[kind]
    return Moment(*rng.choice(functions), number=rng.randint(1, max_number), after=rng.random() < 0.5)


def start(data: Path, out: Path, ranks: int, *, victim: int = 0, moment: Moment | None = None) -> list[int]:
    """Fork the ranks, as torchrun would start them; return their process ids.  Rank ``victim`` dies at ``moment``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            if moment is not None and rank == victim:
                moment.arm()
            flags = ["--data_dir", str(data), "--output_dir", str(out), *FLAGS, "--checkpoint_steps", "1", "--resume"]
            with draw_nothing(), short_end(report=True):
                code = train.main([*flags, "--device", "cpu"])
        finally:
            os._exit(code)
    return children


def wait(child: int, seconds: float) -> int | None:
    """Return the exit status of a process; None while it runs after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def finish(children: list[int]) -> None:
    for child in children:
        assert wait(child, 120) == 0


def check_same(out: Path, whole: Path) -> None:
    """Assert that two runs have the same weights, and the same summary but for its timings."""
    for name in ("last", "best"):
        steps = [Checkpoint.load(folder / "checkpoints" / f"{name}.pt").step for folder in (out, whole)]
        assert steps[0] == steps[1], name
        for model in ("model", "ema_model"):
            assert_same(weights(out, name, model), weights(whole, name, model))
    assert untimed(read_summary(out)) == untimed(read_summary(whole))


def run_until_killed(data: Path, out: Path, ranks: int, kind: str, rng: random.Random, seconds: float) -> bool:
    """Start the run, to be killed at a moment of this kind; return whether it was killed, or else ended by itself."""
    victim = 0 if kind == "saving" else rng.randrange(ranks)
    moment = None if kind == ANY_TIME else draw_moment(kind, rng)
    children = start(data, out, ranks, victim=victim, moment=moment)
    status = wait(children[victim], rng.uniform(0, seconds) if moment is None else 120)
    if status is None:
        assert moment is None, f"it neither ended nor was killed: {moment}"
        os.kill(children[victim], signal.SIGKILL)
        status = wait(children[victim], 10)  # one that had just ended keeps its own
    others = [child for rank, child in enumerate(children) if rank != victim]
    if status == 0:
        finish(others)
        return False
    assert status == -signal.SIGKILL, status
    for other in others:
        assert wait(other, MAX_WAIT) is not None, "a rank hangs after another was killed"
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--patients", type=int, default=48, help="patients to train on, 6 a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng, base = random.Random(options.seed), Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    splits = {
        name: make_patients([[1 + (7 * i + k) % 11 for k in range(1 + i % 6)] for i in range(count)], prefix=name)
        for name, count in {"train": options.patients, "valid": 8, "test": 8}.items()
    }
    data, whole, out = write_data_dir(base / "data", splits), base / "whole", base / "run1"
    began = time.monotonic()
    finish(start(data, whole, options.ranks))
    seconds = time.monotonic() - began
    kills, runs, resumed, kinds = Counter[str](), 1, 0, itertools.cycle([*MOMENTS, ANY_TIME])
    while kills.total() < options.kills:
        kind = next(kinds)
        if run_until_killed(data, out, options.ranks, kind, rng, seconds):
            kills[kind] += 1
            last = out / "checkpoints" / "last.pt"
            if last.exists():
                Checkpoint.load(last)
                resumed += 1
        else:
            check_same(out, whole)
            runs, out = runs + 1, base / f"run{runs + 1}"
    finish(start(data, out, options.ranks))
    check_same(out, whole)
    shutil.rmtree(base)
    counts = {"kills": dict(kills), "with_a_checkpoint": resumed, "runs_compared": runs, "bit_identical": True}
    print(json.dumps({"ranks": options.ranks, **counts, "seconds_of_a_whole_run": round(seconds, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
