"""Run tasks on the workers of a Dask cluster, which may join late, leave, or run out of memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from pipeline.schema import UserError

if TYPE_CHECKING:
    from distributed import Client, Future, KilledWorker

DASK: Final = "dask://"
LOOK_SECONDS: Final = 5.0
"""Seconds without a result after which it is looked whether any worker takes tasks."""


@dataclass(eq=False)
class DaskCluster:
    """The workers of a Dask scheduler; their number is not looked at, so it may change at any time."""

    name: str  # as --executor gives it
    client: Client
    _left: list[tuple[str, frozenset[Any]]] = field(default_factory=list)  # address of each worker that left, its tasks
    _used: dict[str, int] = field(default_factory=dict)  # bytes, by address, of workers that Dask ended for them
    _waits: bool = False  # it was said that no worker takes tasks

    def __post_init__(self) -> None:
        self.client.subscribe_topic("all", self._note_worker_that_left)
        self.client.subscribe_topic("worker-restart-memory", self._note_worker_without_memory)

    def run(
        self, stage: str, function: Callable[..., Any], tasks: Mapping[int, tuple[Any, ...]], names: Mapping[int, str]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number and the result of each task, as they are done; Dask's dashboard names tasks by ``stage``.

        A task that is done is forgotten at once, so nothing of it is done again when its worker leaves.  A task that
        raises ends the stage.  So does one with which as many workers died as the scheduler allows: a
        ChildProcessError of one line, with the task's name in ``names``.
        """
        from distributed import KilledWorker  # noqa: PLC0415  an optional extra, slow to import

        group = f"{stage}-{uuid4().hex}"  # never that of another run, whose results Dask might give
        pending, done = self._submit(group, function, tasks)
        try:
            while pending:
                for number, result in self._gather(stage, done, pending):
                    del pending[number]
                    yield number, result
        except KilledWorker as error:
            raise ChildProcessError(self._explain(error, stage, pending, names)) from None
        except CancelledError:
            raise ChildProcessError(
                f"--executor {self.name}: the scheduler has ended, or dropped the tasks of {stage}; "
                "start it again, and the same command goes on from here"
            ) from None
        finally:
            self.client.cancel(list(pending.values()))
        self._say_who_left(group, stage)

    def _submit(
        self, group: str, function: Callable[..., Any], tasks: Mapping[int, tuple[Any, ...]]
    ) -> tuple[dict[int, Future[Any]], Queue[int]]:
        """Return the futures of tasks, which Dask keeps for as long, and where the numbers of those done will be."""
        done: Queue[int] = Queue()
        keys = [(group, number) for number in tasks]
        futures = self.client.map(function, *zip(*tasks.values(), strict=True), key=keys, pure=False) if tasks else []
        for number, future in zip(tasks, futures, strict=True):
            future.add_done_callback(lambda _, number=number: done.put(number))
        return dict(zip(tasks, futures, strict=True)), done

    def _gather(self, stage: str, done: Queue[int], pending: Mapping[int, Future[Any]]) -> list[tuple[int, Any]]:
        """Wait for tasks, and return the numbers and results of those that are done; none after ``LOOK_SECONDS``."""
        try:
            numbers = [done.get(timeout=LOOK_SECONDS)]
        except Empty:
            self._say_if_none_works(stage)
            return []
        self._waits = False
        while not done.empty():
            numbers.append(done.get())
        return list(zip(numbers, self.client.gather([pending[number] for number in numbers]), strict=True))

    def _note_worker_that_left(self, event: tuple[float, dict[str, Any]]) -> None:
        _, said = event
        if said.get("action") == "remove-worker":
            keys = frozenset(said["processing-tasks"]) | frozenset(said["lost-computed-tasks"])
            self._left.append((said["worker"], keys))

    def _note_worker_without_memory(self, event: tuple[float, dict[str, Any]]) -> None:
        _, said = event
        self._used[said["worker"]] = said["rss"]

    def _say_if_none_works(self, stage: str) -> None:
        """Say once in a line that the stage waits: no worker is there, or all are out of memory."""
        scheduler = self.client.scheduler
        assert scheduler is not None  # the client is open
        try:
            workers = self.client.sync(scheduler.identity)["workers"].values()
        except OSError:  # the scheduler is gone: the tasks are cancelled
            return
        waits = not any(worker["status"] == "running" for worker in workers)
        if waits and not self._waits:
            reason = "no worker is there; it goes on when one joins"
            if workers:
                limit = _format_limit(min(worker["memory_limit"] for worker in workers))
                reason = f"all {len(workers)} workers are paused, near {limit}; give them more memory or fewer threads"
            print(f"--executor {self.name}: {stage} waits: {reason}", file=sys.stderr)
        self._waits = waits

    def _say_who_left(self, group: str, stage: str) -> None:
        """Say in a line how many tasks of a stage were given to another worker, as theirs left."""
        numbers = [len(found) for _, keys in self._left if (found := [key for key in keys if key[0] == group])]
        if numbers:
            said = f"workers that left or died: {len(numbers)}; tasks of theirs that others did: {sum(numbers)}"
            print(f"--executor {self.name}: {stage}: {said}", file=sys.stderr)

    def _explain(
        self, error: KilledWorker, stage: str, pending: Mapping[int, Future[Any]], names: Mapping[int, str]
    ) -> str:
        """Return the line that says with which task workers died, and why.

        Tasks that only waited on the same workers failed with it: it is named alone if it is known to have run.
        """
        failed = {number: future for number, future in pending.items() if future.status == "error"}
        running = [number for number, future in failed.items() if future.key in error.last_worker.executing]
        tasks = " or ".join(f"{number}{names.get(number, '')}" for number in running or failed)
        limit = _format_limit(error.last_worker.memory_limit)
        lost = {address for address, keys in self._left for future in failed.values() if future.key in keys}
        used = [self._used[each] for each in lost | {error.last_worker.address} if each in self._used]
        why = f"one at {max(used) / 2**30:.2f} GiB of {limit}" if used else f"most likely for want of memory ({limit})"
        return (
            f"--executor {self.name}: workers died with task {tasks} of {stage}, {error.allowed_failures + 1} in all, "
            f"{why}; give workers more memory or fewer threads, and the same command goes on from here, "
            "or start afresh with smaller --events_per_shard"
        )


def _format_limit(num_bytes: int) -> str:
    return f"a limit of {num_bytes / 2**30:.2f} GiB" if num_bytes else "no limit"


@contextmanager
def open_dask(name: str) -> Iterator[DaskCluster]:
    """Open the cluster of ``dask://HOST:PORT`` or of a scheduler's file; raise UserError where no scheduler answers."""
    try:
        from distributed import Client  # noqa: PLC0415  an optional extra, slow to import
    except ImportError:
        raise UserError(f"--executor {name}: needs Dask; pip install 'seqsetvae[dask]'") from None
    if not name.startswith(DASK) and not Path(name).is_file():  # Dask would wait for it
        raise UserError(f"--executor {name}: no such file; give local, dask://HOST:PORT or a Dask scheduler's file")
    address = {"address": f"tcp://{name.removeprefix(DASK)}"} if name.startswith(DASK) else {"scheduler_file": name}
    try:
        client = Client(**address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--executor {name}: no Dask scheduler answers ({error}); start one, or use local") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it tells is told here, in a line
    with client:
        try:
            yield DaskCluster(name, client)
        finally:
            if client.status == "running":  # or the scheduler logs a traceback, as it tells a client that it has left
                client.unsubscribe_topic("all")
