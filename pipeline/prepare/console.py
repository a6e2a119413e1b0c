"""What ``preprocess.py`` shows on the terminal: progress of stages, and a summary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.prepare.journal import Progress as StageProgress


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
    print(f"labels from {summary['labels_from'] or 'nowhere'}; {summary['unlabelled_patients']:,} patients unlabelled")
    memory = f"at most {summary['peak_rss_bytes'] / 2**20:,.0f} MiB in a process"
    print(f"{summary['seconds']:.1f} s, {summary['events_per_second'] / 1e6:.2f} M rows/s, {memory}")
