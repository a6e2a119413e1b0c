"""Prepare an input into a data directory, by tasks that run on any ``concurrent.futures.Executor``.

1. *Read*, a task a piece of the input: read, clean, and spill the kept rows to disk, sorted by a hash of the patient.
2. *Sort*, a task a partition (a range of hashes, cut from all spills): drop duplicates, make sets, sort, and compute
   the moments of the train split, which are then merged to the vocabulary.
3. *Write*, a task a partition: codes and scaled values, to one shard a split.

Pieces and partitions follow from the input alone, so the output is the same, byte for byte, whatever runs the tasks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task
from pipeline.prepare.executors import ONE_PROCESS, ExecutionOptions, open_executor
from pipeline.prepare.gather import MERGERS
from pipeline.prepare.inputs import check_disk_space, compute_fingerprint
from pipeline.prepare.journal import JOURNAL, Progress, StageRunner, ignore_progress
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.publish import claim_output_folder
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.sources.reading import Piece
from pipeline.prepare.sources.source import Source
from pipeline.prepare.stages import Stages
from pipeline.prepare.summary import read_summary, write_summary
from pipeline.prepare.tasks import default_exclusions, read_patient_names, write_task
from pipeline.prepare.warn import warn_of_strangers
from pipeline.schema import DEFAULT_TASK, SUMMARY_FILE, TASKS_FOLDER

WORK_FOLDERS: Final = ("spills", "merged", "sorted", "rejects", "late_rejects", "index", "data", *MERGERS)


def build(
    source: Source,
    output: Path,
    options: BuildOptions,
    *,
    execution: ExecutionOptions = ONE_PROCESS,
    overwrite: bool = False,
    progress: Progress = ignore_progress,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prepare ``source`` into the data directory ``output`` and return the summary.

    A run that was stopped goes on where it was.  Where the output exists already, made of the same input and options,
    only its summary is read.

    Args:
        source: the input.
        output: a new or an empty folder, or a data directory, which ``overwrite`` allows to replace.
        options: with the source, what decides the output; ``execution`` does not.
        progress: is called after every task.
        log: receives lines: what was recognised, and that a run does not begin from nothing.

    Raises:
        UserError: the input cannot be used as a whole, or the output folder not at all; nothing new is left in it.
    """
    started = time.monotonic()
    description = options.describe(source)
    pieces: list[Piece] = []

    def read_fingerprint() -> str:
        pieces[:], checksums = source.cut()
        return compute_fingerprint(source, description, execution, checksums)

    with claim_output_folder(output.absolute(), read_fingerprint, overwrite=overwrite, log=log) as claimed:
        if claimed is None:
            return read_summary(output / SUMMARY_FILE)
        work, fingerprint = claimed
        if not (work / JOURNAL).exists():
            check_disk_space(source, output)
        labels = source.read_labels(options.hide)  # before the long work: they may be refused
        for name in WORK_FOLDERS:
            (work / name).mkdir(exist_ok=True)
        notes = source.describe()
        for note in notes:
            log(note)
        with open_executor(execution, max_workers=len(pieces)) as executor:
            results = Stages(StageRunner(executor, work, progress), source, pieces, options).run(execution)
        data, counts = work / "data", results.join_tables(work)
        manifest = results.make_manifest(data, description, fingerprint)
        task = _write_default_task(data, manifest, labels)
        summary = results.summarise(counts, description, task, time.monotonic() - started)
        summary["files_left_out"] = len(source.list_events().left_out)
        summary["notes"] = [] if options.pseudonyms else notes  # files are often named like patients
        summary["warnings"] = results.find_warnings(task)
        if task and labels:
            names = None if options.pseudonyms else read_patient_names(data, manifest)
            summary["warnings"] += [*labels.warnings, *warn_of_strangers(task, labels, names)]
        summary = write_summary(data / SUMMARY_FILE, summary)
        manifest.save(data)
    return summary


def _write_default_task(data: Path, manifest: Manifest, labels: Labels | None) -> Task | None:
    """Write the task of the input's own labels; return None without any."""
    if (data / TASKS_FOLDER).exists():  # of a run that was stopped before its manifest was written
        shutil.rmtree(data / TASKS_FOLDER)
    if labels is None:
        return None
    exclude_codes = default_exclusions(manifest.options["format"], labels)
    return write_task(data, manifest, DEFAULT_TASK, labels, exclude_codes)
