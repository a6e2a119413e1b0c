"""Prepare event tables for training, once: ``python preprocess.py INPUT --output DATA``."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.prepare.build import build
from pipeline.prepare.command import PreprocessOptions, parse_command, resolve_options
from pipeline.prepare.dry_run import plan_work
from pipeline.prepare.inputs import compute_fingerprint
from pipeline.prepare.journal import Progress as StageProgress
from pipeline.prepare.places import Places
from pipeline.reports.data_report import write_data_report
from pipeline.schema import PRIVATE_UMASK, REPORT_FILE, UserError
from pipeline.storage.files import remove_leftovers

OUT_OF_MEMORY: Final = (
    "out of memory; the same command goes on with fewer --workers, on Dask with more memory for each, "
    "or afresh with smaller shards"
)
DISK_FULL: Final = "{}: no space left on the disk; free some, and the same command goes on from here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend.  Only the owner can read the files it makes."""
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    output = None
    try:
        options, explicit = parse_command(arguments)
        command = options.command
        output = command.output
        with Places.claim(command.input, output, command.work_dir) as places:
            summary = prepare(options, explicit, places)
        if summary is None:
            return 0
    except (UserError, OSError, MemoryError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM if isinstance(error, MemoryError) else None
        known: dict[int | None, str] = {errno.ENOSPC: DISK_FULL.format(output), errno.ENOMEM: OUT_OF_MEMORY}
        print(f"preprocess.py: {known.get(number, error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("preprocess.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    print_summary(summary, verbose=command.verbose)
    print(f"{output}: ready; {output.rstrip('/')}/{REPORT_FILE} shows it")
    return 0


def prepare(options: PreprocessOptions, explicit: frozenset[str], places: Places) -> dict[str, Any] | None:
    """Do what a command says, and return the summary; None where it was asked what would be done."""
    command, console = options.command, Console(stderr=True, highlight=False)
    log = partial(console.print, f"{command.output}:", soft_wrap=True)
    places.fetch_input(partial(console.print, f"{command.input}:", soft_wrap=True))
    source, build_options = resolve_options(options, explicit, places)
    console.print(f"{command.input}: read as {source.name}")
    if command.dry_run:
        for line in plan_work(source, build_options, num_workers=options.execution.workers):
            print(line)
        return None
    published = places.find_published()
    if published is not None and not command.overwrite:
        places.check_published(
            published, compute_fingerprint(source, build_options.describe(source), options.execution)
        )
        log("the data set of this input and these options is here already; nothing to do")
        return places.read_summary()
    execution, output = options.execution, places.output
    overwrite = command.overwrite or places.target is not None  # what is in the work folder is only on its way
    with stage_bars(console) as bars:
        summary = build(source, output, build_options, execution=execution, overwrite=overwrite, progress=bars, log=log)
    if not (output / REPORT_FILE).exists():
        remove_leftovers(output, REPORT_FILE)
        write_data_report(output)
    places.upload(log)
    places.clear()
    return summary


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(number)


@contextmanager
def stage_bars(console: Console) -> Iterator[StageProgress]:
    """Show a progress bar for each stage, with its rate, and give the function that updates them."""
    count = TextColumn("{task.completed}/{task.total}  {task.fields[rate]}")
    columns = (TextColumn("{task.description:>6}"), BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bars:

        def update(stage: str, *, done: int, total: int, rows: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            elapsed = bars.tasks[tasks[stage]].elapsed
            rate = f"{rows / elapsed / 1e6:.2f} M rows/s" if elapsed else ""
            bars.update(tasks[stage], completed=done, rate=rate)

        yield update


def print_summary(summary: dict[str, Any], *, verbose: bool) -> None:
    """Print the counts of a summary; if ``verbose``, all of it but the ids of patients."""
    if verbose:
        shown = {name: value for name, value in summary.items() if name != "patients_without_events_first"}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
    counts: dict[str, dict[str, int]] = summary["splits"]
    table = Table("", *counts["train"])
    for split, numbers in counts.items():
        table.add_row(split, *(f"{number:,}" for number in numbers.values()))
    Console().print(table)
    rejects = ", ".join(f"{reason} {number:,}" for reason, number in summary["rejects"].items()) or "none"
    print(f"rows {summary['events_in']:,} = written {summary['events_written']:,} + rejected ({rejects})")
    samples: list[dict[str, int]] = [*summary["samples"].values()]
    total, labelled = (sum(split[name] for split in samples) for name in ("num_samples", "num_labelled"))
    print(f"labels from {summary['labels_from'] or 'nowhere'}: {total:,} samples, {labelled:,} labelled")
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    memory = f"at most {summary['peak_rss_bytes'] / 2**20:,.0f} MiB in a process"
    print(f"{summary['seconds']:.1f} s, {summary['events_per_second'] / 1e6:.2f} M rows/s, {memory}")


if __name__ == "__main__":
    sys.exit(main())
