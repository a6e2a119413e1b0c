"""The files of a run: its folder, its log, its memory profiles and the checkpoints that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pipeline.options import to_dict
from pipeline.schema import UserError
from pipeline.storage.files import remove_leftovers, write_atomically
from training.json_lines import JsonLines
from training.memory import StepMemory
from training.metrics import Progress
from training.options import TrainOptions
from training.parallel import World
from training.targets import TEACHER_FILE, Teacher


def open_directory(
    directory: Path, options: TrainOptions, world: World, memory: StepMemory | None, teacher: Teacher | None
) -> None:
    """Write what a run is; nothing was written before, so that a command that is refused changes no file."""
    checkpoints, path = directory / "checkpoints", directory / "config.yaml"
    config = yaml.safe_dump(to_dict(options), sort_keys=False).encode()
    if world.is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in (directory, checkpoints):  # not below: other runs may be going on there
            remove_leftovers(folder)
        write_atomically(path, config)
        if memory is not None:
            memory.save(directory / "memory_model.json")
        if teacher is not None:
            teacher.save(directory / TEACHER_FILE)
    world.wait()
    written = world.gather(config)[0]  # that of another machine may name its own copy of the data
    same = world.gather(path.exists() and path.read_bytes() == written)
    if not all(same):
        unseen = f"rank {same.index(False)} does not see the files of rank 0; name a folder that all machines share"
        raise UserError(f"--output_dir {directory}: {unseen}")


def remove_other_best(checkpoints: Path, progress: Progress) -> None:
    """Remove the checkpoints ``best_<step>.pt`` of validations that are no longer among the best."""
    kept = {f"best_{metrics['step']}.pt" for metrics in progress.best_saved}
    for path in checkpoints.glob("best_*.pt"):
        if path.name not in kept:
            path.unlink()


@contextmanager
def open_metrics_log(run_dir: Path, world: World, keep: int) -> Iterator[JsonLines | None]:
    """Give the file metrics.jsonl with the first ``keep`` lines that it has, on the first rank; None on others."""
    if not world.is_main:
        yield None
        return
    with JsonLines(run_dir / "metrics.jsonl", keep=keep) as lines:
        yield lines


def memory_file(run_dir: Path, world: World) -> Path:
    """Return where a rank's memory profile goes."""
    return run_dir / ("memory.csv" if world.is_main else f"memory_rank{world.rank}.csv")
