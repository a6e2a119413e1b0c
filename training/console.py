"""What a run says while it goes: losses gathered on the device, a progress bar, a log; and the signals it hears."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from model.losses import Losses
from training.metrics import JsonLines, Throughput
from training.parallel import World

console = Console(stderr=True, highlight=False)


class LossSums:
    """Losses gathered on the device; it is waited for when they are read, not at each step."""

    def __init__(self, device: torch.device) -> None:
        self.names = ["loss", "reconstruction", "kl", "classification", "grad_norm"]
        self.values = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, loss: Losses, grad_norm: Tensor | None) -> None:
        parts = [loss.total.detach(), loss.reconstruction, loss.kl, loss.classification]
        parts += [loss.total.new_zeros(()) if grad_norm is None else grad_norm]
        self.values += torch.stack([part.double() for part in parts])
        self.steps += 1

    def totals(self, world: World) -> dict[str, float]:
        """Sums over steps and ranks; starts again from nothing."""
        summed = dict(zip(self.names, world.sum(self.values).tolist(), strict=True))
        self.values, self.steps = torch.zeros_like(self.values), 0
        return summed

    def means(self, world: World) -> dict[str, float]:
        """Means over steps since the last reading; ranks hold shares of a loss, and the same norm of the gradient."""
        steps = max(self.steps, 1)
        means = {name: value / steps for name, value in self.totals(world).items()}
        means["grad_norm"] /= world.size
        return means


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave between two steps."""

    number: int | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.number = number


class EpochBar:
    """One progress bar an epoch with patients/s, padding waste and memory; lines alone where there is no terminal."""

    def __init__(self, world: World, max_epochs: int) -> None:
        self.world, self.max_epochs, self.epoch = world, max_epochs, 0
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        shown = world.is_main and console.is_terminal
        self.bar = Progress(*columns, TextColumn("{task.fields[now]}"), console=console, disable=not shown)
        self.task: TaskID | None = None

    def __enter__(self) -> EpochBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, epoch: int, steps: int, done: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.epoch = epoch
        self.task = self.bar.add_task(f"epoch {epoch + 1}/{self.max_epochs}", total=steps, completed=done, now="")

    def advance(self, throughput: Throughput) -> None:
        if self.task is not None and not self.bar.disable:
            rates, memory = throughput.rates(), psutil.Process().memory_info().rss / 2**30
            # Of this rank, times their number: all ranks would have to stop to be asked.
            speed, waste = rates["patients_per_second"] * self.world.size, rates["event_padding_waste"]
            now = f"{speed:.1f} patients/s, padding {waste:.1%}, {memory:.2f} GiB"
            self.bar.update(self.task, advance=1, now=now)

    def end(self, metrics: dict[str, Any], better: bool) -> None:
        quality = f"AUROC {shown(metrics['auroc'])}, AUPRC {shown(metrics['auprc'])}"
        text = f"epoch {self.epoch + 1}/{self.max_epochs}: loss {shown(metrics['loss'])}, {quality}"
        say(self.world, text + (" (best so far)" if better else ""))


@contextlib.contextmanager
def metrics_log(run_dir: Path, world: World, step: int) -> Iterator[Callable[..., None]]:
    """``log(kind, **numbers)``, which adds a line to metrics.jsonl on the first rank and does nothing on others."""
    if not world.is_main:
        yield lambda kind, **numbers: None
        return
    with JsonLines(run_dir / "metrics.jsonl", resume_step=step) as lines:
        yield lambda kind, **numbers: lines.write({"kind": kind, **numbers})


def memory_file(run_dir: Path, world: World) -> Path:
    return run_dir / ("memory.csv" if world.is_main else f"memory_rank{world.rank}.csv")


def shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def say(world: World, text: str) -> None:
    if world.is_main:
        console.print(text, markup=False, soft_wrap=True)
