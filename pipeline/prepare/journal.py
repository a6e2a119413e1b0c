"""Run the tasks of a stage with a journal, so that a task that is done is not done again.

A task writes files; when they are complete, its result and their checksums are written to
``journal/<stage>/<task>.json``, whole or not at all.  A run that was killed finds its journal and goes on with the
tasks that have no entry, or whose files are not as they left them.  Files that later stages have used up are removed a
whole folder at a time; they are made again where those stages turn out not to be done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from pipeline.storage.files import file_sha256, seal, unseal, write_atomically

T = TypeVar("T", bound=Any)  # a dataclass of JSON values, arrays and such dataclasses

JOURNAL: Final = "journal"
CLEARED_FOLDERS: Final = ("spills/", "sorted/")
"""Folders whose files are removed as a whole when a later stage needs them no more."""


class Progress(Protocol):
    """Receives the progress of a stage, from any thread."""

    def __call__(self, stage: str, *, done: int, total: int, rows: int) -> None: ...


def ignore_progress(stage: str, *, done: int, total: int, rows: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks of one kind.

    Attributes:
        name: a word for users.
        task: the function that does a task.
        result: the dataclass that a task returns.
        size: the number of rows that a result is about.
        leaves: patterns of the files below the work folder that task number ``{}`` writes.
    """

    name: str
    task: Callable[..., Any]
    result: type[Any]
    size: Callable[[Any], int]
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageRunner:
    """Runs the tasks of stages on an executor and reports progress.

    Attributes:
        executor: of any kind; see ``pipeline.prepare.executors``.
        work: the folder that holds the journal.
        progress: is called after every task.
    """

    executor: Executor
    work: Path
    progress: Progress

    def run(
        self,
        stage: Stage,
        arguments: Sequence[tuple[Any, ...]],
        are_files_used_up: Callable[[list[Any]], bool] = lambda results: False,
    ) -> list[Any]:
        """Return the results of the tasks in the order of ``arguments``; the first failure ends the stage.

        Args:
            stage: the tasks.
            arguments: those of each task, the same ones whenever this run is begun.
            are_files_used_up: whether later stages are done, given all results, so that the files may be gone.
        """
        entries = self._entries(stage.name, len(arguments))
        entries[0].parent.mkdir(parents=True, exist_ok=True)
        results = self._read_results(stage, entries, are_files_used_up)
        done, rows = len(results), sum(map(stage.size, results.values()))

        def report() -> None:
            self.progress(stage.name, done=done, total=len(arguments), rows=rows)

        def count(future: Future[Any]) -> None:
            nonlocal done, rows
            if not future.cancelled() and future.exception() is None:
                done, rows = done + 1, rows + stage.size(future.result())
                report()

        report()
        futures: dict[int, Future[Any]] = {}
        try:
            for number, task_arguments in enumerate(arguments):
                if number not in results:
                    leaves = [pattern.format(number) for pattern in stage.leaves]
                    entry, task = entries[number], stage.task
                    futures[number] = self.executor.submit(_do, entry, self.work, leaves, task, task_arguments)
                    futures[number].add_done_callback(count)
            return [results[n] if n in results else futures[n].result() for n in range(len(arguments))]
        finally:
            for future in futures.values():
                future.cancel()

    def _read_results(
        self, stage: Stage, entries: Sequence[Path], are_files_used_up: Callable[[list[Any]], bool]
    ) -> dict[int, Any]:
        """Return the results of tasks that are done and whose files are there or used up, by their numbers."""
        journal = {number: _read_entry(entry, self.work) for number, entry in enumerate(entries)}
        results = {n: _decode(stage.result, entry.result) for n, entry in journal.items() if entry is not None}
        cleared = {number for number, entry in journal.items() if entry is not None and entry.is_cleared}
        if cleared and not (len(results) == len(entries) and are_files_used_up(list(results.values()))):
            return {number: result for number, result in results.items() if number not in cleared}
        return results

    def are_done(self, stages: Sequence[str], total: int) -> bool:
        """Return whether the first of ``stages``, of ``total`` tasks each, is done and left its files.

        Files that are gone must have been used up by the next of ``stages``.
        """
        if not stages:
            return False
        journal = [_read_entry(entry, self.work) for entry in self._entries(stages[0], total)]
        done = [entry.is_cleared for entry in journal if entry is not None]
        return len(done) == total and (not any(done) or self.are_done(stages[1:], total))

    def _entries(self, stage: str, total: int) -> list[Path]:
        return [self.work / JOURNAL / stage / f"{number:06d}.json" for number in range(total)]


def _do(entry: Path, work: Path, leaves: list[str], task: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """Run a task and write its entry of the journal."""
    result = task(*arguments)
    files = [path for pattern in leaves for path in sorted(work.glob(pattern))]
    plain = json.loads(json.dumps(dataclasses.asdict(result), default=np.ndarray.tolist))
    checksums = {path.relative_to(work).as_posix(): file_sha256(path) for path in files}
    content = seal({"task": _name(entry), "result": plain, "files": checksums})
    write_atomically(entry, json.dumps(content).encode())
    return result


def _name(entry: Path) -> str:
    return f"{entry.parent.name}/{entry.stem}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """The result of a task, and whether files that it left are gone with their whole folder."""

    result: dict[str, Any]
    is_cleared: bool


def _read_entry(path: Path, work: Path) -> _Entry | None:
    """Return the entry of a task that is done; None where it is missing, or it or a file is damaged."""
    try:
        content = unseal(json.loads(path.read_bytes()), path, "")
        if content["task"] != _name(path):
            return None
        is_cleared = False
        for name, sha256 in content["files"].items():
            file = work / name
            if name.startswith(CLEARED_FOLDERS) and not file.exists() and not any(file.parent.iterdir()):
                is_cleared = True
            elif file_sha256(file) != sha256:
                return None
    except (OSError, ValueError, RecursionError):
        return None
    return _Entry(content["result"], is_cleared)


def _decode(kind: Any, content: Any) -> Any:
    """Return the value of type ``kind`` that JSON content stands for."""
    arguments = get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints: dict[str, Any] = get_type_hints(kind)
        make: Any = kind
        return make(**{name: _decode(hints[name], value) for name, value in content.items()})
    if get_origin(kind) is np.ndarray:
        return np.array(content, get_args(arguments[1])[0])
    if get_origin(kind) is dict:
        return {name: _decode(arguments[1], value) for name, value in content.items()}
    return [_decode(arguments[0], item) for item in content] if get_origin(kind) is list else content
