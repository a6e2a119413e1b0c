"""The output folder: one run at a time, nothing of others touched, complete or not there.

A run stages everything in ``OUTPUT/.preprocess``.  Publishing removes what an older data set's manifest names,
moves the staged files out, and the manifest last.  Killed in between, the next run finds the staged manifest and ends
the move.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pipeline.schema import (
    EMBEDDINGS_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    REJECTS_FILE,
    REPORT_FILE,
    SPLITS,
    SUMMARY_FILE,
    VOCABULARY_FILE,
    UserError,
)
from pipeline.shards import Manifest, sync

WORK: Final = ".preprocess"
FILES: Final = (INDEX_FILE, VOCABULARY_FILE, EMBEDDINGS_FILE, REJECTS_FILE, SUMMARY_FILE, REPORT_FILE)


@contextmanager
def output_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Claim ``output`` and give an empty work folder in it, whose ``data`` is published in the end.

    On an error the work folder is removed, and so is the output folder if this made it.

    Raises:
        UserError: it holds files that are no data set, a data set that may not be overwritten, or another run's work.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    work = output / WORK
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    with _lock(work):
        moving = (work / "data" / MANIFEST_FILE).exists()
        try:
            if moving:
                _publish(work, output)
                moving = False
            _refuse_others(output, overwrite=overwrite)
            for leftover in work.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
            (work / "data").mkdir()
            yield work
            _refuse_collisions(work, output)
            moving = True
            _publish(work, output)
            moving = False
        finally:
            if not moving:  # else the next run ends the move
                shutil.rmtree(work)
            if made and not any(output.iterdir()):
                output.rmdir()


@contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Hold the work folder; the system lets go of it when the process ends, however it ends."""
    lock = work / "lock"
    if work.exists() and not lock.exists():
        raise UserError(f"{work}: not made by preprocess.py; remove it, or name another --output")
    work.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{work.parent}: another preprocess.py is writing here; wait for it, or name another --output"
            ) from None
        yield


def _refuse_others(output: Path, *, overwrite: bool) -> None:
    if (output / MANIFEST_FILE).exists():
        if not overwrite:
            raise UserError(f"{output}: holds a data set; give --overwrite to replace it, or name another --output")
        Manifest.load(output)
        return
    others = sorted(path.name for path in output.iterdir() if path.name != WORK)
    if others:
        raise UserError(f"{output}: holds {others[0]!r} and no data set; name an empty or a new folder with --output")


def _names(data_set: Path) -> list[str]:
    """Every file of a data set but its manifest."""
    shards = Manifest.load(data_set).splits.values()
    return [*FILES, *(entry.path for entries in shards for entry in entries)]


def _refuse_collisions(work: Path, output: Path) -> None:
    ours = set(_names(output)) if (output / MANIFEST_FILE).exists() else set()
    for name in set(_names(work / "data")) - ours:
        if (output / name).exists():
            raise UserError(
                f"{output / name}: not made by preprocess.py, and in the way; move it, or name another --output"
            )


def _publish(work: Path, output: Path) -> None:
    """Replace the data set in ``output`` by the staged one.  Each step can be repeated after a kill."""
    stage, replaced = work / "data", work / "replaced"
    if (output / MANIFEST_FILE).exists():
        replaced.mkdir(exist_ok=True)
        os.replace(output / MANIFEST_FILE, replaced / MANIFEST_FILE)
    if (replaced / MANIFEST_FILE).exists():
        for name in _names(replaced):
            (output / name).unlink(missing_ok=True)
        (replaced / MANIFEST_FILE).unlink()
    for staged in sorted(path for path in stage.rglob("*") if path.is_file()):
        target = output / staged.relative_to(stage)
        if target.name != MANIFEST_FILE:
            target.parent.mkdir(exist_ok=True)
            os.replace(staged, target)
    for split in SPLITS:
        if (folder := output / split).is_dir():
            sync(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
    sync(output)
    os.replace(stage / MANIFEST_FILE, output / MANIFEST_FILE)
    sync(output)
