"""Claim the output folder, and publish a data set in it: complete or absent, and nothing of others touched.

A run stages everything in ``OUTPUT/.preprocess``.  One that is stopped leaves it there, and the next run on the same
input and options goes on with it.  Publishing removes what the manifest of an older data set names, moves the staged
files out, and the manifest last.  If it is killed in between, the next run finds the staged manifest and ends the move.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import find_tasks, task_files
from pipeline.schema import (
    EMBEDDINGS_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    REJECTS_FILE,
    REPORT_FILE,
    SPLITS,
    SUMMARY_FILE,
    TASKS_FOLDER,
    VOCABULARY_FILE,
    UserError,
)
from pipeline.storage.files import file_sha256, remove_leftovers, sync, write_atomically

WORK: Final = ".preprocess"
LOCK_FILE: Final = "lock"
RUN_FILE: Final = "run.json"
"""File in the work folder that says of what input and options its content is."""

FILES: Final = (INDEX_FILE, VOCABULARY_FILE, EMBEDDINGS_FILE, REJECTS_FILE, SUMMARY_FILE, REPORT_FILE)


@contextmanager
def claim_output_folder(
    output: Path, read_fingerprint: Callable[[], str], *, overwrite: bool, log: Callable[[str], None]
) -> Iterator[tuple[Path, str] | None]:
    """Claim ``output``; yield a work folder in it, whose ``data`` is published in the end, and the fingerprint.

    The work folder holds what a stopped run of the same fingerprint left, and nothing else.  It stays when the body is
    stopped by the system (a full disk, a lost worker) or by hand; on any other error it is removed, and so is the
    output folder if this call made it.  Where the data set of this fingerprint exists already, None is yielded.

    ``read_fingerprint`` returns the fingerprint of input and options.  It may take hours, so it is called when the
    folder is claimed, and everything that can be refused without it has been.  ``log`` receives a line when the work
    does not begin from nothing.

    Raises:
        UserError: it holds files that are no data set, a data set that may not be overwritten, or another run's work.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    work = output / WORK
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    with _lock(work):
        if (work / "data" / MANIFEST_FILE).exists():
            _publish(work, output)
            _clear(work)
        keep = (work / RUN_FILE).exists()  # a run that is refused throws away nothing
        try:
            existing = _load_manifest(output)
            fingerprint = read_fingerprint()
            if existing is not None and not overwrite:
                check_same(output, existing, fingerprint, partial(_has_file, output))
                log("the data set of this input and these options is here already; nothing to do")
                keep = False
                yield None
                return
            _resume_or_clear(work, fingerprint, log)
            keep = False
            yield work, fingerprint
            _refuse_collisions(work, output)
            keep = True  # from here on the next run ends the move
            _publish(work, output)
            keep = False
        except (OSError, MemoryError, KeyboardInterrupt):
            keep = keep or (work / RUN_FILE).exists()
            raise
        finally:
            if not keep:
                _remove(work)
            if is_new and not any(output.iterdir()):
                output.rmdir()


@contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Lock the work folder; the system unlocks it when the process ends, however it ends."""
    lock = work / LOCK_FILE
    if work.exists() and not lock.exists() and any(work.iterdir()):
        raise UserError(f"{work}: not made by preprocess.py; remove it, or name another --output")
    work.mkdir(exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"{work.parent}: another preprocess.py is writing here"
            raise UserError(f"{problem}; wait for it, or name another --output") from None
        yield


def _load_manifest(output: Path) -> Manifest | None:
    """Return the manifest of the data set in the folder, None where it is empty; raise UserError for anything else."""
    if (output / MANIFEST_FILE).exists():
        return Manifest.load(output)
    others = sorted(path.name for path in output.iterdir() if path.name != WORK)
    if others:
        raise UserError(f"{output}: holds {others[0]!r} and no data set; name an empty or a new folder with --output")
    return None


def check_same(
    output: object, manifest: Manifest, fingerprint: str, is_there: Callable[[str, int | None, str], bool]
) -> None:
    """Raise UserError unless a data set has that fingerprint and is complete.

    ``is_there`` says whether ``output`` has the file of a name, a size in bytes (None = any) and a checksum.
    """
    if manifest.fingerprint != fingerprint:
        problem = f"{output}: holds a data set of other input or options"
        raise UserError(f"{problem}; give --overwrite to replace it, or name another --output")
    shards = manifest.all_shards()
    files: list[tuple[str, int | None, str]] = [(each.path, each.num_bytes, each.sha256) for each in shards]
    files += [(name, None, sha256) for name, sha256 in manifest.files.items()]
    bad = next((name for name, size, sha256 in files if not is_there(name, size, sha256)), None)
    if bad is not None:
        problem = f"{output}/{bad}: missing, or not as it was written"
        raise UserError(f"{problem}; give --overwrite to make the data set again")


def _has_file(output: Path, name: str, size: int | None, sha256: str) -> bool:
    """Return whether a folder has a file; those without a size are small, and their content is looked at."""
    path = output / name
    return path.is_file() and (file_sha256(path) == sha256 if size is None else path.stat().st_size == size)


def _resume_or_clear(work: Path, fingerprint: str, log: Callable[[str], None]) -> None:
    """Leave in the work folder only what a run of this fingerprint can go on with."""
    run = work / RUN_FILE
    content = json.dumps({"format_version": FORMAT_VERSION, "fingerprint": fingerprint}).encode()
    earlier = run.read_bytes() if run.exists() else None
    if earlier == content:
        log("an earlier run was stopped; it goes on where it was")
        remove_leftovers(work, below=True)
        return
    if earlier is not None:
        log("an earlier run was stopped, but input or options are others now; beginning afresh")
    _clear(work)
    write_atomically(run, content)


def _clear(work: Path) -> None:
    (work / RUN_FILE).unlink(missing_ok=True)  # first: what is left half cleared is nothing to go on with
    for leftover in work.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != LOCK_FILE:
            leftover.unlink()


def _remove(work: Path) -> None:
    """Remove the work folder, its lock last: a folder with other files and no lock is not ours."""
    _clear(work)
    (work / LOCK_FILE).unlink()
    with suppress(OSError):  # another run came in between, and locked it
        work.rmdir()


def _list_files(data_set: Path, tasks_in: Path | None = None) -> list[str]:
    """Return the names of all files of a data set but its manifest; its tasks may lie elsewhere."""
    manifest = Manifest.load(data_set)
    tasks = [name for task in find_tasks(tasks_in or data_set, manifest) for name in task_files(task.name)]
    return [*FILES, *(entry.path for entry in manifest.all_shards()), *tasks]


def _refuse_collisions(work: Path, output: Path) -> None:
    existing = set(_list_files(output)) if (output / MANIFEST_FILE).exists() else set()
    for name in set(_list_files(work / "data")) - existing:
        if (output / name).exists():
            problem = f"{output / name}: not made by preprocess.py, and in the way"
            raise UserError(f"{problem}; move it, or name another --output")


def _publish(work: Path, output: Path) -> None:
    """Replace the data set in ``output`` by the staged one; each step can be repeated after a kill."""
    staged, replaced = work / "data", work / "replaced"
    (work / RUN_FILE).unlink(missing_ok=True)  # without its shards the rest is nothing to go on with
    if (output / MANIFEST_FILE).exists():
        replaced.mkdir(exist_ok=True)
        os.replace(output / MANIFEST_FILE, replaced / MANIFEST_FILE)
    if (replaced / MANIFEST_FILE).exists():
        for name in _list_files(replaced, output):
            (output / name).unlink(missing_ok=True)
        (replaced / MANIFEST_FILE).unlink()
    for name in _list_files(staged):
        if (staged / name).exists():
            (output / name).parent.mkdir(exist_ok=True)
            os.replace(staged / name, output / name)
    for split in (*SPLITS, TASKS_FOLDER):
        if (folder := output / split).is_dir():
            sync(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
    sync(output)
    os.replace(staged / MANIFEST_FILE, output / MANIFEST_FILE)
    sync(output)
