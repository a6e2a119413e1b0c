"""Gather what tasks of a stage found, some hundred at a time, so that no process ever holds that of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from pipeline.prepare.journal import Stage, StageRunner, ignore_progress
from pipeline.prepare.moments import Moments
from pipeline.prepare.scales import merge_scales

GROUP: Final = 1024
"""Maximum number of files that a task gathers."""

MOMENTS: Final = "moments"
MEASURED: Final = "measured"
"""Folders of the moments of partitions: as they are written, and before outliers are dealt with."""
SCALES: Final = "scales"
"""Folder of the scales of pieces."""


def _merge_moments(paths: Sequence[Path], target: Path) -> None:
    Moments.merge(map(Moments.load, paths)).save(target)


MERGERS: Final[Mapping[str, Callable[[Sequence[Path], Path], None]]] = {
    MOMENTS: _merge_moments,
    MEASURED: _merge_moments,
    SCALES: merge_scales,
}


@dataclass(frozen=True, slots=True)
class Gathered:
    """How many files were gathered."""

    num_files: int


def locate(work: Path, folder: str, number: int) -> Path:
    """Return the path of what task ``number`` found."""
    return work / folder / f"{number:05d}.found"


def gather(work: Path, folder: str, number: int, total: int) -> Gathered:
    """Merge what a group of the ``total`` tasks found, in their order, to ``<folder>/gathered-<number>``."""
    paths = [locate(work, folder, each) for each in range(number * GROUP, min(total, (number + 1) * GROUP))]
    MERGERS[folder](paths, _locate_gathered(work, folder, number))
    return Gathered(len(paths))


def gather_all(runner: StageRunner, folder: str, total: int) -> Path:
    """Merge what all of ``total`` tasks found, and return the file; it takes too little time to be shown."""
    stage = Stage(f"gather_{folder}", gather, Gathered, attrgetter("num_files"), (f"{folder}/gathered-{{:05d}}",))
    num_groups = -(-total // GROUP)
    tasks: list[tuple[Any, ...]] = [(runner.work, folder, number, total) for number in range(num_groups)]
    replace(runner, progress=ignore_progress).run(stage, tasks)
    paths = [_locate_gathered(runner.work, folder, number) for number in range(num_groups)]
    if num_groups == 1:
        return paths[0]
    MERGERS[folder](paths, runner.work / folder / "all")
    return runner.work / folder / "all"


def _locate_gathered(work: Path, folder: str, number: int) -> Path:
    return work / folder / f"gathered-{number:05d}"
