"""What a run says while it goes: lines, a progress bar and a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.machine import rss_bytes
from training.metrics import Throughput
from training.parallel import World

HEADLINE_TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "r2": "R²", "mae": "MAE"}

console = Console(stderr=True, highlight=False)


def log_main(world: World, text: str) -> None:
    """Print a line on standard error, on the first rank only."""
    if world.is_main:
        console.print(world.name + text, markup=False, soft_wrap=True)


def format_metric(value: float | None) -> str:
    """Return a metric with four digits, or the word for one that is undefined."""
    return "undefined" if value is None else f"{value:.4f}"


def format_quality(metrics: Mapping[str, Any]) -> str:
    """Return the headlines of a task as text, of several tasks one after another."""
    if "tasks" in metrics:
        return "; ".join(f"{name}: {format_quality(each)}" for name, each in metrics["tasks"].items())
    found = ((title, metrics[name]) for name, title in HEADLINE_TITLES.items() if name in metrics)
    return ", ".join(f"{title} {format_metric(value)}" for title, value in found)


def measure_memory(device: torch.device) -> dict[str, int]:
    """Return the memory in bytes that this process holds; of a GPU what tensors take, and the most that they took."""
    held = {"rss_bytes": rss_bytes()}
    if device.type == "cuda":
        held["cuda_allocated_bytes"] = torch.cuda.memory_allocated(device)
        held["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return held


def format_memory(held: Mapping[str, int]) -> str:
    """Return what :func:`measure_memory` found as text."""
    text = f"{held['rss_bytes'] / 2**30:.2f} GiB"
    if "cuda_peak_bytes" in held:
        now, peak = (held[name] / 2**30 for name in ("cuda_allocated_bytes", "cuda_peak_bytes"))
        text += f", GPU {now:.2f} GiB (at most {peak:.2f})"
    return text


class EpochBar:
    """One progress bar an epoch with patients/s, padding waste and memory; lines only where there is no terminal."""

    def __init__(self, world: World, max_epochs: int) -> None:
        self.world, self.max_epochs, self.epoch = world, max_epochs, 0
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        visible = world.is_main and console.is_terminal and not world.name  # of several runs there would be several
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
            rates, memory = throughput.rates(), format_memory(measure_memory(self.world.device))
            # This rank's rate times the number of ranks: all ranks would have to stop to be asked.
            speed, waste = rates["patients_per_second"] * self.world.size, rates["event_padding_waste"]
            now = f"{speed:.1f} patients/s, padding {waste:.1%}, {memory}"
            self.bar.update(self.task, advance=1, now=now)

    def end(self, epoch: int, metrics: dict[str, Any], *, step: int | None, improved: bool) -> None:
        """Print the metrics of a validation, of an epoch or at a ``step`` within it."""
        place = f"epoch {epoch + 1}/{self.max_epochs}" + ("" if step is None else f", step {step:,}")
        if metrics["loss"] is None:  # nobody is left to validate, as where a final model learns from all
            log_main(self.world, f"{place}: done")
            return
        text = f"{place}: loss {format_metric(metrics['loss'])}, {format_quality(metrics)}"
        log_main(self.world, text + (" (best so far)" if improved else ""))
