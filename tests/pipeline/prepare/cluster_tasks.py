"""Tasks for workers of a cluster, in a file of its own that imports next to nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def tell_worker(folder: Path, number: int) -> int:
    """Say in a file which process began a task, and return that when there is a file ``go``, for all or for this."""
    with (folder / f"{number}.begun").open("a") as file:
        file.write(f"{os.getpid()}\n")
    while not ((folder / "go").exists() or (folder / f"{number}.go").exists()):
        time.sleep(0.01)
    return os.getpid()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_memory(num_bytes: int) -> int:
    """Take memory, if any, until the process is killed, so late that the scheduler has heard what it runs."""
    if not num_bytes:
        return 0
    time.sleep(1.2)
    held = b"\1" * num_bytes
    time.sleep(60)
    return len(held)


def fail(folder: Path) -> None:
    with (folder / "failed").open("a") as file:
        file.write("once\n")
    raise ZeroDivisionError


def list_stages(dask_scheduler: Any) -> list[str]:
    """Return what the dashboard of a scheduler calls its tasks."""
    return sorted(dask_scheduler.task_prefixes)


if __name__ == "__main__":  # a cluster with workers as long as there are tasks
    from distributed import LocalCluster

    arguments: dict[str, Any] = {"processes": False, "protocol": "tcp://", "dashboard_address": None}
    with LocalCluster(n_workers=0, threads_per_worker=1, **arguments) as cluster:
        cluster.adapt(minimum=0, maximum=2, interval="100ms", wait_count=1)
        Path(sys.argv[1]).write_text(cluster.scheduler_address)
        time.sleep(600)
