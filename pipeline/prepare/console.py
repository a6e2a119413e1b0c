"""What ``preprocess.py`` shows on the terminal: progress of stages, and a summary."""

from __future__ import annotations

import json
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class StageBars:
    """A progress bar for each stage, with its rate."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>6}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, stage: str, *, done: int, total: int, rows: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, rate="")
        task = self._tasks[stage]
        elapsed = self._bars.tasks[task].elapsed
        rate = f"{rows / elapsed / 1e6:.2f} M rows/s" if elapsed else ""
        self._bars.update(task, completed=done, rate=rate)


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
    print(
        f"{summary['seconds']:.1f} s, {summary['events_per_second'] / 1e6:.2f} M rows/s, "
        f"at most {summary['peak_rss_bytes'] / 2**20:,.0f} MiB in a process"
    )
