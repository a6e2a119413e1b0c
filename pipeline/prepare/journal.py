"""Run the tasks of a stage with a journal, so that a task that is done is not done again.

A task writes files; when they are complete, its result and their checksums are written to
``journal/<stage>/<task>.json``, whole or not at all.  A run that was killed finds its journal and goes on with the
tasks that have no entry, or whose files are not as they left them.  So nobody waits until the work is on the disk: what
a power loss leaves undone is done again.  Files that later stages have used up are removed a whole folder at a time;
they are made again where those stages turn out not to be done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, get_args, get_origin, get_type_hints

from pipeline.prepare.executors import UNNAMED, TaskExecutor, run_tasks
from pipeline.storage.files import file_crc32, seal, unseal, write_atomically

JOURNAL: Final = "journal"
CLEARED_FOLDERS: Final = ("spills/", "merged/", "sorted/")
"""Folders whose files are removed when later stages need them no more."""

IsUsedUp: TypeAlias = Callable[[str], bool]
"""Says of a file, named below the work folder, whether it may be gone."""


def is_needed(path: str) -> bool:
    """Say that no file may be gone."""
    return False


def is_cleared(path: str) -> bool:
    """Say that the files of ``CLEARED_FOLDERS`` may be gone."""
    return path.startswith(CLEARED_FOLDERS)


class Progress(Protocol):
    """Receives the progress of a stage."""

    def __call__(self, stage: str, *, done: int, total: int, rows: int) -> None: ...


def ignore_progress(stage: str, *, done: int, total: int, rows: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks of one kind."""

    name: str
    task: Callable[..., Any]
    result: type[Any]  # the dataclass that a task returns, of JSON values and such dataclasses
    size: Callable[[Any], int]  # the number of rows that a result is about
    leaves: tuple[str, ...] = ()  # patterns of the files below the work folder that task number {} writes


@dataclass(frozen=True, slots=True)
class StageRunner:
    """Runs the tasks of stages on an executor, with a journal in the folder ``work``."""

    executor: TaskExecutor
    work: Path
    progress: Progress

    def run(
        self,
        stage: Stage,
        arguments: Sequence[tuple[Any, ...]],
        find_used_up: Callable[[list[Any]], IsUsedUp] = lambda results: is_needed,
        clear: Callable[[int], None] = lambda number: None,
        names: Mapping[int, str] = UNNAMED,
    ) -> list[Any]:
        """Return the results of the tasks in the order of their ``arguments``; the first failure ends the stage.

        Given all results, ``find_used_up`` tells which files later stages have used up, so that they may be gone.
        ``clear`` is called with the number of each task that is done, and removes what only this task needed.
        ``names`` are shown behind the number of a task with which workers die.
        """
        total = len(arguments)
        (self.work / JOURNAL / stage.name).mkdir(parents=True, exist_ok=True)
        results = self._read_results(stage, total, is_cleared)
        is_used_up = find_used_up(list(results.values())) if len(results) == total else is_needed
        if is_used_up is not is_cleared:
            results = self._read_results(stage, total, is_used_up)
        for number in results:
            clear(number)
        rows = sum(map(stage.size, results.values()))
        self.progress(stage.name, done=len(results), total=total, rows=rows)
        missing = {number: (number, arguments[number]) for number in range(total) if number not in results}
        for number, result in run_tasks(self.executor, stage.name, partial(_do, stage, self.work), missing, names):
            results[number] = result
            clear(number)
            rows += stage.size(result)
            self.progress(stage.name, done=len(results), total=total, rows=rows)
        return [results[number] for number in range(total)]

    def are_done(self, stages: Sequence[str], total: int) -> bool:
        """Return whether the first of ``stages``, of ``total`` tasks each, is done and left its files.

        Files that are gone must have been used up by the next of ``stages``.
        """
        is_used_up = is_cleared if len(stages) > 1 and self.are_done(stages[1:], total) else is_needed
        return all(self.is_done(stages[0], number, is_used_up) for number in range(total))

    def is_done(self, stage: str, number: int, is_used_up: IsUsedUp = is_needed) -> bool:
        """Return whether a task is done and left its files."""
        return _read_entry(self.work, stage, number, is_used_up) is not None

    def _read_results(self, stage: Stage, total: int, is_used_up: IsUsedUp) -> dict[int, Any]:
        """Return the results of tasks that are done, by their numbers."""
        entries = ((number, _read_entry(self.work, stage.name, number, is_used_up)) for number in range(total))
        return {number: _decode(stage.result, entry) for number, entry in entries if entry is not None}


def _locate_entry(work: Path, stage: str, number: int) -> tuple[str, Path]:
    """Return the name of a task, and the path of its entry in the journal."""
    name = f"{stage}/{number:06d}"
    return name, work / JOURNAL / f"{name}.json"


def _do(stage: Stage, work: Path, number: int, arguments: tuple[Any, ...]) -> Any:
    """Run a task and write its entry of the journal."""
    result = stage.task(*arguments)
    files = [path for pattern in stage.leaves for path in sorted(work.glob(pattern.format(number)))]
    plain = json.loads(json.dumps(dataclasses.asdict(result)))
    checksums = {path.relative_to(work).as_posix(): file_crc32(path) for path in files}
    name, entry = _locate_entry(work, stage.name, number)
    content = json.dumps(seal({"task": name, "result": plain, "files": checksums})).encode()
    write_atomically(entry, content, is_synced=False)
    return result


def _read_entry(work: Path, stage: str, number: int, is_used_up: IsUsedUp) -> dict[str, Any] | None:
    """Return the result of a task that is done; None where its entry or a needed file is missing or damaged."""
    name, entry = _locate_entry(work, stage, number)
    try:
        content = unseal(json.loads(entry.read_bytes()), entry, "")
        needed = {work / path: checksum for path, checksum in content["files"].items() if not is_used_up(path)}
        is_whole = content["task"] == name and all(file_crc32(path) == checksum for path, checksum in needed.items())
    except (OSError, ValueError, RecursionError):
        return None
    return content["result"] if is_whole else None


def _decode(kind: Any, content: Any) -> Any:
    """Return the value of type ``kind`` that JSON content stands for."""
    arguments = get_args(kind)
    if hints := get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}:
        return kind(**{name: _decode(hints[name], value) for name, value in content.items()})
    if get_origin(kind) is dict:
        return {name: _decode(arguments[1], value) for name, value in content.items()}
    return [_decode(arguments[0], item) for item in content] if get_origin(kind) is list else content
