"""Stages of tasks, with a journal: a task that has been done is not done again.

A task leaves files; when they are complete, what it found and their checksums are written to
``journal/<stage>/<task>.json``, whole or not at all.  A run that was killed finds its journal and goes on with the
tasks that have no entry, or whose files are not as they left them.  Files that later stages have used up go a whole
folder at a time; they are made again where those stages turn out not to be done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from pipeline.storage.files import file_sha256, seal, unseal, write_atomically

T = TypeVar("T", bound=Any)  # a dataclass of JSON values, arrays and such dataclasses

JOURNAL = "journal"
CLEARED = ("spills/", "sorted/")
"""Folders whose files go as a whole when a later stage is through with them."""


class Progress(Protocol):
    """Told of work as it ends; from any thread."""

    def __call__(self, stage: str, *, done: int, total: int, rows: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Stages:
    """Runs the tasks of a stage on the executor, and tells how far it is.

    Attributes:
        executor: of any kind; see ``pipeline.prepare.executors``.
        work: the folder that holds the journal.
        progress: told of every task that is done.
    """

    executor: Executor
    work: Path
    progress: Progress | None

    def __call__(
        self,
        stage: str,
        task: Callable[..., T],
        arguments: Sequence[tuple[Any, ...]],
        *,
        from_json: Callable[[dict[str, Any]], T],
        size: Callable[[T], int],
        leaves: Sequence[str] = (),
        used_up: Callable[[list[T]], bool] = lambda found: False,
    ) -> list[T]:
        """What the tasks found, in the order of ``arguments``; the first failure ends the stage.

        Args:
            stage: a word for users.
            task: run once for each of ``arguments``.
            arguments: the same ones whenever this run is begun.
            from_json: makes what a task returned of its fields.
            size: rows that a task was about.
            leaves: patterns of the files below ``work`` that task ``{}`` writes.
            used_up: whether later stages are done, given what all the tasks found, so that the files may be gone.
        """
        entries = self._entries(stage, len(arguments))
        entries[0].parent.mkdir(parents=True, exist_ok=True)
        journal = {number: _read(entry, self.work) for number, entry in enumerate(entries)}
        found = {number: from_json(entry.found) for number, entry in journal.items() if entry is not None}
        cleared = {number for number, entry in journal.items() if entry is not None and entry.cleared}
        if cleared and not (len(found) == len(entries) and used_up(list(found.values()))):
            found = {number: result for number, result in found.items() if number not in cleared}
        done, rows = len(found), sum(map(size, found.values()))
        if self.progress is not None:
            self.progress(stage, done=done, total=len(arguments), rows=rows)

        def tell(future: Future[T]) -> None:
            nonlocal done, rows
            if self.progress is not None and not future.cancelled() and future.exception() is None:
                done, rows = done + 1, rows + size(future.result())
                self.progress(stage, done=done, total=len(arguments), rows=rows)

        futures: dict[int, Future[T]] = {}
        try:
            for number, given in enumerate(arguments):
                if number not in found:
                    files = [pattern.format(number) for pattern in leaves]
                    futures[number] = self.executor.submit(_do, entries[number], self.work, files, task, given)
                    futures[number].add_done_callback(tell)
            return [found[number] if number in found else futures[number].result() for number in range(len(arguments))]
        finally:
            for future in futures.values():
                future.cancel()

    def are_done(self, stages: Sequence[str], total: int) -> bool:
        """Whether the first of ``stages``, of ``total`` tasks each, is done, and its files are there or used up by the
        next.
        """
        if not stages:
            return False
        journal = [_read(entry, self.work) for entry in self._entries(stages[0], total)]
        done = [entry for entry in journal if entry is not None]
        if len(done) < total:
            return False
        return not any(entry.cleared for entry in done) or self.are_done(stages[1:], total)

    def _entries(self, stage: str, total: int) -> list[Path]:
        return [self.work / JOURNAL / stage / f"{number:06d}.json" for number in range(total)]


def _do(entry: Path, work: Path, leaves: list[str], task: Callable[..., T], given: tuple[Any, ...]) -> T:
    found = task(*given)
    files = [path for pattern in leaves for path in sorted(work.glob(pattern))]
    content = {
        "task": _name(entry),
        "found": json.loads(json.dumps(asdict(found), default=_plain)),
        "files": {path.relative_to(work).as_posix(): file_sha256(path) for path in files},
    }
    write_atomically(entry, json.dumps(seal(content)).encode())
    return found


def _name(entry: Path) -> str:
    return f"{entry.parent.name}/{entry.stem}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a task found, and whether files that it left are gone with their whole folder."""

    found: dict[str, Any]
    cleared: bool


def _read(path: Path, work: Path) -> _Entry | None:
    """The entry of a task that is done; None where it is missing, or it or a file is damaged."""
    try:
        content = unseal(json.loads(path.read_bytes()), path, "")
        if content["task"] != _name(path):
            return None
        cleared = False
        for name, sha256 in content["files"].items():
            file = work / name
            if name.startswith(CLEARED) and not file.exists() and not any(file.parent.iterdir()):
                cleared = True
            elif file_sha256(file) != sha256:
                return None
    except (OSError, ValueError, RecursionError):
        return None
    return _Entry(content["found"], cleared)


def _plain(array: object) -> object:
    assert isinstance(array, np.ndarray)
    return array.tolist()
