"""What a run says while it goes: lines, a progress bar and a log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.json_lines import JsonLines
from training.metrics import Throughput
from training.parallel import World

HEADLINE_TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "r2": "R²", "mae": "MAE"}

console = Console(stderr=True, highlight=False)


def log_main(world: World, text: str) -> None:
    """Print a line on standard error, on the first rank only."""
    if world.is_main:
        console.print(text, markup=False, soft_wrap=True)


def format_metric(value: float | None) -> str:
    """Return a metric with four digits, or the word for one that is undefined."""
    return "undefined" if value is None else f"{value:.4f}"


def format_quality(metrics: Mapping[str, Any]) -> str:
    """Return the headlines of a task as text, of several tasks one after another."""
    if "tasks" in metrics:
        return "; ".join(f"{name}: {format_quality(each)}" for name, each in metrics["tasks"].items())
    found = ((title, metrics[name]) for name, title in HEADLINE_TITLES.items() if name in metrics)
    return ", ".join(f"{title} {format_metric(value)}" for title, value in found)


class EpochBar:
    """One progress bar an epoch with patients/s, padding waste and memory; lines only where there is no terminal."""

    def __init__(self, world: World, max_epochs: int) -> None:
        self.world, self.max_epochs, self.epoch = world, max_epochs, 0
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        visible = world.is_main and console.is_terminal
        self.bar = Progress(*columns, TextColumn("{task.fields[now]}"), console=console, disable=not visible)
        self.task = self.bar.add_task("", visible=False, now="")

    def __enter__(self) -> EpochBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, epoch: int, steps: int, done: int) -> None:
        """Show the bar of an epoch of ``steps`` steps, of which some are ``done``."""
        self.epoch, name = epoch, f"epoch {epoch + 1}/{self.max_epochs}"
        self.bar.reset(self.task, description=name, total=steps, completed=done, visible=True, now="")

    def advance(self, throughput: Throughput) -> None:
        """Show that a step is done, with the rates of ``throughput``."""
        if not self.bar.disable:
            rates, memory = throughput.rates(), psutil.Process().memory_info().rss / 2**30
            # This rank's rate times the number of ranks: all ranks would have to stop to be asked.
            speed, waste = rates["patients_per_second"] * self.world.size, rates["event_padding_waste"]
            now = f"{speed:.1f} patients/s, padding {waste:.1%}, {memory:.2f} GiB"
            self.bar.update(self.task, advance=1, now=now)

    def end(self, epoch: int, metrics: dict[str, Any], *, improved: bool) -> None:
        """Print the metrics of a validated epoch."""
        text = f"epoch {epoch + 1}/{self.max_epochs}: loss {format_metric(metrics['loss'])}, {format_quality(metrics)}"
        log_main(self.world, text + (" (best so far)" if improved else ""))


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
