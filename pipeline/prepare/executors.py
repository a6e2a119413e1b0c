"""Run tasks in this process, in processes of this machine, or on the workers of a Dask cluster.

Tasks may be run twice and anywhere: they read and write files of a folder that every worker sees, and put each in place
whole.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from types import MappingProxyType
from typing import Any, Final, TypeAlias, TypeVar

import pyarrow as pa

from pipeline.machine import exit_with_parent, usable_cores
from pipeline.options import Section, option
from pipeline.prepare.cluster import DaskCluster, open_dask

T = TypeVar("T")

LOCAL: Final = "local"
MAX_SUBMITTED: Final = 1024
"""Tasks that an executor of this machine is given at a time: what it keeps of each takes memory."""
UNNAMED: Final[Mapping[int, str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions(Section):
    """How the work is run; the output does not depend on it."""

    executor: str = option(LOCAL, "Where tasks run: local, dask://HOST:PORT, or the file of a Dask scheduler.")
    workers: int = option(usable_cores(), "Number of processes of --executor local.", minimum=1)


ONE_PROCESS: Final = ExecutionOptions(workers=1)


class InlineExecutor:
    """Stands for this process, which runs a task when its result is asked for."""


TaskExecutor: TypeAlias = Executor | DaskCluster | InlineExecutor


@contextmanager
def open_executor(options: ExecutionOptions, max_workers: int) -> Iterator[TaskExecutor]:
    """Open the executor of ``--executor``, with at most ``max_workers`` local processes of one thread each.

    One process alone is this one, with all threads.  A worker that is killed (on Dask: with the same task, as often as
    the scheduler allows) ends the work with a ChildProcessError.
    """
    name, workers = options.executor, min(options.workers, max_workers)
    try:
        if name != LOCAL:
            with open_dask(name) as cluster:
                yield cluster
        elif workers == 1:
            yield InlineExecutor()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as executor:
                yield executor
    except BrokenExecutor:
        advice = "run the same again with fewer --workers, or start afresh with smaller --events_per_shard"
        raise ChildProcessError(f"a worker process was killed, most likely for want of memory; {advice}") from None


def run_tasks(
    executor: TaskExecutor,
    stage: str,
    function: Callable[..., T],
    tasks: Mapping[int, tuple[Any, ...]],
    names: Mapping[int, str] = UNNAMED,
) -> Iterator[tuple[int, T]]:
    """Call ``function`` with the arguments of each task; yield the tasks' numbers and results, in any order.

    A cluster names tasks by their ``stage``, and an error that is not the task's own by their ``names`` too.
    """
    if isinstance(executor, DaskCluster):
        return executor.run(stage, function, tasks, names)
    if isinstance(executor, InlineExecutor):
        return ((number, function(*arguments)) for number, arguments in tasks.items())
    return _run_ahead(executor, function, tasks)


def _run_ahead(
    executor: Executor, function: Callable[..., T], tasks: Mapping[int, tuple[Any, ...]]
) -> Iterator[tuple[int, T]]:
    """Yield numbers and results in the order of tasks, of which ``MAX_SUBMITTED`` wait or run at a time."""
    submitted: deque[tuple[int, Future[T]]] = deque()
    try:
        for number, arguments in tasks.items():
            if len(submitted) == MAX_SUBMITTED:
                first, future = submitted.popleft()
                yield first, future.result()
            submitted.append((number, executor.submit(function, *arguments)))
        while submitted:
            number, future = submitted.popleft()
            yield number, future.result()
    finally:  # of a task that failed, or of a stage that was left
        for _, future in submitted:
            future.cancel()


def _start_worker() -> None:
    """Limit the work to one thread, and let this process end when its parent ends, killed or not."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # read when Polars first works, not when it is imported
    pa.set_cpu_count(1)
    exit_with_parent()
