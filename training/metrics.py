"""What a run measures of its steps, sums of losses and throughput, and how far it has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from model.config import Outcome
from model.losses import Losses
from pipeline.loading.batch import PatientBatch
from training.parallel import World


def task_losses(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the names under which the losses of tasks are summed."""
    return [f"outcome_{outcome.name}" for outcome in outcomes]


class LossSums:
    """Sums of losses and gradient norms, gathered on the device; the host waits for it only when they are read."""

    def __init__(
        self, device: torch.device, outcomes: Sequence[Outcome], saved: Mapping[str, float] | None = None
    ) -> None:
        self.names = ["loss", "reconstruction", "kl", "outcome", "grad_norm", *task_losses(outcomes)]
        start = [saved[name] if saved else 0.0 for name in self.names]
        self.values = torch.tensor(start, dtype=torch.float64, device=device)

    def add(self, losses: Losses, grad_norm: Tensor | None = None) -> None:
        """Add one batch's share of the losses; ranks hold shares of a loss, and the same norm of the gradient."""
        norm = losses.total.new_zeros(()) if grad_norm is None else grad_norm
        parts = [losses.total.detach(), losses.reconstruction, losses.kl, losses.outcome, norm]
        self.values += torch.cat([torch.stack(parts), losses.tasks]).double()

    def combine(self, world: World) -> dict[str, float]:
        """Return the sums over all ranks, which the first rank then holds for all, so that they count once."""
        summed = world.sum(self.values.clone())
        self.values = summed if world.is_main else torch.zeros_like(summed)
        return dict(zip(self.names, summed.tolist(), strict=True))


@dataclass(kw_only=True)
class BatchAmounts:
    """What throughput counts of a batch: real things, and the cells of its padded layout, padding included."""

    num_patients: int = 0
    num_events: int = 0
    num_sets: int = 0
    event_cells: int = 0
    set_cells: int = 0

    @classmethod
    def of(cls, batch: PatientBatch, *, pad_to: int | None = None) -> Self:
        """Count a batch on the CPU; ``pad_to`` is the number of columns, by default the batch's longest patient."""
        events, sets = batch.events_per_patient.numpy(), batch.sets_per_patient.numpy()
        return cls(
            num_patients=batch.num_patients,
            num_events=batch.num_events,
            num_sets=batch.num_sets,
            event_cells=batch.num_patients * (int(events.max(initial=0)) if pad_to is None else pad_to),
            set_cells=batch.num_patients * int(sets.max(initial=0)),
        )


@dataclass(kw_only=True)
class Throughput(BatchAmounts):
    """Sums over the steps of an interval.

    Attributes:
        seconds: wall time from the end of one step to the end of the next, waiting included.
        waited: the part of it in which the launching thread did not run the step.
    """

    num_steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, amounts: BatchAmounts, *, seconds: float, waited: float) -> None:
        """Count one step on a batch of ``amounts``."""
        step = {**vars(amounts), "num_steps": 1, "seconds": seconds, "waited": waited}
        for name, amount in step.items():
            setattr(self, name, getattr(self, name) + amount)

    @classmethod
    def combine(cls, ranks: Sequence[Throughput]) -> Throughput:
        """Combine the throughput of all ranks: counts are summed, steps and seconds averaged."""
        sums = {name: sum(getattr(rank, name) for rank in ranks) for name in vars(ranks[0])}
        means = {name: sums[name] / len(ranks) for name in ("seconds", "waited")}
        return cls(**{**sums, **means, "num_steps": sums["num_steps"] // len(ranks)})

    def share(self, world: World) -> Throughput:
        """Return the part of a combined throughput that this rank keeps: the first has the counts, all the times."""
        times = Throughput(num_steps=self.num_steps, seconds=self.seconds, waited=self.waited)
        return self if world.is_main else times

    def rates(self) -> dict[str, float]:
        """Return amounts per second of wall time, and fractions; 0 where there was nothing."""
        return {
            "patients_per_second": _ratio(self.num_patients, self.seconds),
            "events_per_second": _ratio(self.num_events, self.seconds),
            "data_wait_fraction": _ratio(self.waited, self.seconds),
            "event_padding_waste": _ratio(self.event_cells - self.num_events, self.event_cells),
            "set_padding_waste": _ratio(self.set_cells - self.num_sets, self.set_cells),
        }


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; plain numbers, the same on every rank.

    Attributes:
        epochs_validated: epochs whose validation is done; one less than the epochs done while it is still to come.
        epochs_since_best: epochs validated after the one in which the best validation was.
        step_validated: step of the last validation within an epoch; 0 = none.
        best_step: step of the best validation; -1 = none.
        best_saved: metrics of the best validations whose checkpoints are kept, the best first.
        collapsed: whether the posterior had collapsed when it was last looked at.
        seconds: wall time spent, over all resumed parts of the run.
        threads: of each process's CPU operations, as the run began with.
        log_lines: lines of metrics.jsonl that the first rank had written.
        totals: throughput of all steps so far, of all ranks, as a dictionary.
        interval: throughput since the last line of the log, of all ranks, as a dictionary.
        loss_sums: sums of losses since then, of all ranks; empty = none.
    """

    step: int = 0
    epochs_validated: int = 0
    epochs_since_best: int = 0
    step_validated: int = 0
    best_step: int = -1
    best_saved: list[dict[str, Any]] = field(default_factory=list)
    collapsed: bool = False
    seconds: float = 0.0
    threads: int = 0
    peak_rss_bytes: int = 0
    log_lines: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    interval: dict[str, Any] = field(default_factory=dict)
    loss_sums: dict[str, float] = field(default_factory=dict)


class Meters:
    """What all ranks measure since the last line of the log, and since the run began."""

    def __init__(self, world: World, progress: Progress, outcomes: Sequence[Outcome]) -> None:
        self._world, self._outcomes = world, outcomes
        self.interval = Throughput(**progress.interval).share(world)
        self.totals = Throughput(**progress.totals).share(world)
        self.sums = LossSums(world.device, outcomes, progress.loss_sums if world.is_main else None)

    def add(self, amounts: BatchAmounts, losses: Losses, grad_norm: Tensor, *, seconds: float, waited: float) -> None:
        """Count one step of this rank."""
        for throughput in (self.interval, self.totals):
            throughput.add(amounts, seconds=seconds, waited=waited)
        self.sums.add(losses, grad_norm)

    def end_interval(self) -> tuple[Throughput, dict[str, float]]:
        """Return throughput and mean losses of all ranks since the last call, and begin anew."""
        interval = Throughput.combine(self._world.gather(self.interval))
        sums = self.sums.combine(self._world)
        means = {name: total / max(interval.num_steps, 1) for name, total in sums.items()}
        means["grad_norm"] /= self._world.size  # every rank has the same
        self.interval, self.sums = Throughput(), LossSums(self._world.device, self._outcomes)
        return interval, means

    def store(self, progress: Progress) -> None:
        """Put what all ranks have measured into ``progress``; the first rank then holds it for all."""
        ranks = self._world.gather((self.interval, self.totals))
        interval, totals = (Throughput.combine(meters) for meters in zip(*ranks, strict=True))
        self.interval, self.totals = interval.share(self._world), totals.share(self._world)
        progress.interval, progress.totals = dataclasses.asdict(interval), dataclasses.asdict(totals)
        progress.loss_sums = self.sums.combine(self._world)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
