"""SIGKILL at random moments of training, resumed each time: weights must be those of a run left alone, to the bit.

    python -m tests.faults.kill_training [--kills 50] [--ranks 1]

This process imports everything and forks the ranks, so that a start costs no seconds.  Of two ranks one is killed,
and the other must end by itself within 30 seconds.  Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure  # imported here, not in each fork
import sklearn.calibration
import sklearn.metrics
import torch

import train
from tests.data_dirs import make_patients, write_data_dir
from training.checkpoint import Checkpoint

FLAGS = [
    f"--{word}" for word in ["max_epochs=3", "batch_size=6", "warmup_steps=3", "beta_warmup_steps=10", "log_steps=1"]
]
LONGEST_WAIT = 30.0
IMPORTED = (matplotlib.figure, sklearn.calibration, sklearn.metrics)


def start(data: Path, out: Path, ranks: int) -> list[int]:
    """Fork the ranks, as torchrun would start them; their process ids."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        given = ["--data_dir", str(data), "--output_dir", str(out), *FLAGS, "--checkpoint_steps", "1", "--resume"]
        code = 1
        try:
            code = train.main([*given, "--device", "cpu"])
        finally:
            os._exit(code)
    return children


def wait(child: int, seconds: float) -> int | None:
    """Its exit status; None while it runs after so many seconds."""
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


def same(left: Path, right: Path) -> bool:
    mine, theirs = (Checkpoint.load(out / "checkpoints" / "last.pt") for out in (left, right))
    for name in ("model", "averaged"):
        ours, others = getattr(mine, name), getattr(theirs, name)
        if ours.keys() != others.keys() or not all(torch.equal(ours[key], others[key]) for key in ours):
            return False
    return mine.progress["step"] == theirs.progress["step"]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, base = random.Random(given.seed), Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    splits = {
        name: make_patients([[1 + (7 * i + k) % 11 for k in range(1 + i % 6)] for i in range(count)], prefix=name)
        for name, count in {"train": 48, "valid": 8, "test": 8}.items()
    }
    data = write_data_dir(base / "data", splits)
    began = time.monotonic()
    finish(start(data, base / "whole", given.ranks))
    seconds = time.monotonic() - began
    kills, runs, longest, resumed = 0, 1, 0.0, 0
    out = base / "run1"
    while kills < given.kills:
        children = start(data, out, given.ranks)
        rng.shuffle(children)
        status = wait(children[0], rng.uniform(0, seconds))
        if status is None:
            os.kill(children[0], signal.SIGKILL)
            status = wait(children[0], 10)  # one that had just ended keeps its own
        if status == -signal.SIGKILL:
            kills += 1
            last = out / "checkpoints" / "last.pt"
            if last.exists():
                Checkpoint.load(last)
                resumed += 1
            for other in children[1:]:
                killed = time.monotonic()
                assert wait(other, LONGEST_WAIT) is not None, "a rank hangs after another was killed"
                longest = max(longest, time.monotonic() - killed)
            continue
        assert status == 0, status
        finish(children[1:])
        assert same(out, base / "whole"), f"other weights after {kills} kills"
        runs, out = runs + 1, base / f"run{runs + 1}"
    finish(start(data, out, given.ranks))
    assert same(out, base / "whole"), "other weights"
    shutil.rmtree(base)
    counts = {"kills": kills, "with_a_checkpoint": resumed, "runs_compared": runs, "bit_identical": True}
    times = {"seconds_of_a_whole_run": round(seconds, 2), "others_ended_within_seconds": round(longest, 2)}
    print(json.dumps({"ranks": given.ranks, **counts, **times}))


if __name__ == "__main__":
    sys.exit(main())
