"""Validation: losses, quality and collapse gauges over a split, every patient exactly once, without noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from model.average import TrainedModel
from model.config import Outcome
from model.losses import LossCounts, LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAEOutput
from pipeline.dataset.tasks import common_times
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader
from pipeline.machine import release_free_memory
from pipeline.schema import Times, UserError
from training.collapse import CollapseGauges, is_collapsed
from training.data import BatchPreparer
from training.details import Details
from training.memory import halve, is_out_of_memory
from training.metrics import LossSums, task_losses
from training.options import TrainOptions
from training.parallel import World
from training.predictions import (
    add_empty_samples,
    labels_of,
    labels_of_batch,
    make_table,
    prediction_columns,
    sort_samples,
    values_of,
)
from training.quality import HEADLINES, rank_predictions


def forward_in_parts(
    model: TrainedModel, parts: list[PreparedBatch], world: World, options: TrainOptions, hours: tuple[float, ...] = ()
) -> Iterator[tuple[PreparedBatch, SeqSetVAEOutput]]:
    """Yield each part of a batch, on the device, with the model's output; a part for which memory ends is halved.

    Parts are prepared without noise, with answers after the ``hours``.
    """
    loss = options.loss
    waiting = parts[::-1]
    release_free_memory()  # batches in order of length leave gaps that fit none of the next
    while waiting:
        part, output = waiting.pop(), None
        try:
            with options.optimisation.autocast(world.device):
                prepared = part.to(world.device)
                output = model(prepared, reconstruct=loss.learns_sets, classify=loss.learns_outcome)
        except RuntimeError as error:
            if part.batch.num_patients <= 1 or not is_out_of_memory(error):
                raise
        if output is None:
            preparer = BatchPreparer(seed=None, hours=hours)
            waiting += [preparer.prepare(half, 0) for half in reversed(halve(part.batch))]
        else:
            yield prepared, output


@dataclass(frozen=True, slots=True)
class Validation:
    """What a model makes of a split.

    Attributes:
        metrics: losses and gauges; None where the objective does not use one.
        outcomes: what was predicted.
        tables: the predictions of each, see :func:`training.predictions.make_table`, sorted by patient and time;
            without an outcome head they are null.
    """

    metrics: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    tables: list[pa.Table]

    def rank(self) -> dict[str, Any]:
        """Return the metrics with the headlines of each outcome; None where they are undefined."""
        ranks = []
        for outcome, table in zip(self.outcomes, self.tables, strict=True):
            if table[prediction_columns(outcome)[0]].null_count:
                ranks.append(dict.fromkeys(HEADLINES[outcome.kind]))
            else:
                ranks.append(rank_predictions(labels_of(table, outcome), values_of(table, outcome), outcome))
        return join_tasks(self.metrics, self.outcomes, ranks)


def join_tasks(
    metrics: dict[str, Any], outcomes: tuple[Outcome, ...], of_tasks: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return metrics with those of each task: of one task side by side, of several below ``tasks`` by name.

    Beside several stands the mean of each headline over the tasks that have it; None where one is undefined.
    """
    if len(outcomes) == 1:
        return metrics | of_tasks[0]
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for outcome in outcomes for name in HEADLINES[outcome.kind]):
        values = [each[name] for each in of_tasks if name in each]
        means[name] = None if None in values else float(np.mean(values))
    return metrics | means | {"tasks": {outcome.name: each for outcome, each in zip(outcomes, of_tasks, strict=True)}}


@torch.no_grad()
def validate(
    model: TrainedModel,
    loader: PatientLoader,
    options: TrainOptions,
    world: World,
    check_stop: Callable[[], None],
    details: Details | None = None,
) -> Validation:
    """Evaluate a model on a split, and leave it in eval mode; the result is the same on every rank.

    The ``loader`` is made with a :class:`BatchPreparer` without a seed, with the hours of ``details``, which are shown
    each batch; ``check_stop`` is called between batches, alike on all ranks, and may raise.  A sample without events is
    answered with the prior of its outcome.
    """
    model.eval()
    loss, outcomes, hours = options.loss, model.config.outcomes, details.hours if details else ()
    sums, gauges = LossSums(world.device, outcomes), CollapseGauges(model.config.width, world.device)
    counts, one = np.zeros(2 + len(outcomes), np.int64), LossCounts.one(len(outcomes))
    times = common_times(loader.tasks)
    tables = [_no_predictions(outcomes, times)]
    for ready in loader:
        check_stop()
        for prepared, output in forward_in_parts(model, ready.parts, world, options, hours):
            if details is not None:
                details.add(prepared, output)
                output = output.first(prepared.batch.num_samples)
            with options.optimisation.autocast(world.device):
                sums.add(compute_losses(output, prepared.batch.sample_label, loss, one, beta=loss.beta))
            gauges.update(output.posterior, output.sets.num_counted)
            tables.append(_tables_of(prepared.batch, output, times))
        labelled = np.broadcast_to(ready.counts.num_labelled, len(outcomes))
        counts += [ready.counts.num_events, ready.counts.num_sets, *labelled]
    all_tables = [part for rank in world.gather(tables) for part in rank]
    joined = [pa.concat_tables(parts) for parts in zip(*all_tables, strict=True)]
    totals = sums.combine(world)
    columns = [table[prediction_columns(of)[0]] for table, of in zip(joined, outcomes, strict=True)]
    diverged = any(column.null_count for column in columns)
    if not np.isfinite([*totals.values()]).all() or (loss.learns_outcome and diverged):
        raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")
    if loss.learns_outcome and loader.tasks:
        empty = map(loader.read_empty_samples, loader.tasks)
        joined = [add_empty_samples(*each, times) for each in zip(joined, empty, outcomes, strict=True)]
    joined = [sort_samples(table) for table in joined]
    gauge = gauges.read(world)
    metrics = mean_losses(totals, counts, loss, outcomes) | {
        "active_units": gauge.active_units,
        "mean_posterior_variance": gauge.mean_posterior_variance,
        "collapsed": bool(counts[1]) and is_collapsed(gauge, options.run.min_active_units),
    }
    return Validation(metrics, outcomes, joined)


def _no_predictions(outcomes: tuple[Outcome, ...], times: Times | None) -> list[pa.Table]:
    nothing = [(np.zeros(0), np.zeros((0, outcome.num_outputs))) for outcome in outcomes]
    return [make_table(outcome, [], None, *none, times) for outcome, none in zip(outcomes, nothing, strict=True)]


def _tables_of(batch: PatientBatch, output: SeqSetVAEOutput, times: Times | None) -> list[pa.Table]:
    """Return the predictions of a batch for each outcome; null where none were made."""
    outcomes, who = output.outcomes, batch.sample_names
    labels = labels_of_batch(batch, outcomes)
    if output.logits is None:
        predictions = [np.full((batch.num_samples, outcome.num_outputs), np.nan) for outcome in outcomes]
    else:
        predictions = [prediction.double().cpu().numpy() for prediction in output.predictions]
    each = zip(outcomes, labels, predictions, strict=True)
    return [make_table(outcome, *who, label, prediction, times) for outcome, label, prediction in each]


def mean_losses(
    totals: dict[str, float], counts: npt.NDArray[np.int64], loss: LossOptions, outcomes: tuple[Outcome, ...]
) -> dict[str, float | None]:
    """Return the loss and its parts, each sum divided by its count; None for parts that the objective does not use.

    ``counts`` [2 + T] are of events, sets, and the labelled samples of each task.
    """
    num_events, num_sets, *num_labelled = np.maximum(counts, 1).tolist()
    of_tasks = [totals[name] / count for name, count in zip(task_losses(outcomes), num_labelled, strict=True)]
    outcome = sum(loss.weight_of(task) * mean for task, mean in enumerate(of_tasks))
    means = {"reconstruction": totals["reconstruction"] / num_events, "kl": totals["kl"] / num_sets, "outcome": outcome}
    total = loss.effective_vae_weight * (means["reconstruction"] + loss.beta * means["kl"])
    total += loss.effective_outcome_weight * outcome
    if len(outcomes) > 1:
        means |= dict(zip(task_losses(outcomes), of_tasks, strict=True))
    parts = {
        name: mean if (loss.learns_outcome if name.startswith("outcome") else loss.learns_sets) else None
        for name, mean in means.items()
    }
    return {"loss": total if counts[1] else None, **parts}


def choose_monitor(name: str, loss: LossOptions, outcomes: tuple[Outcome, ...]) -> str:
    """Return the validation metric that decides which epoch is best, where ``name`` may be ``auto``.

    Raises:
        UserError: no outcome has the metric.
    """
    if not loss.learns_outcome:
        return "loss"
    found = {HEADLINES[outcome.kind][0] for outcome in outcomes}
    found |= {"auprc"} if "auroc" in found else set()
    if name == "auto":
        kinds = {outcome.kind == "regression" for outcome in outcomes}
        return "loss" if len(kinds) > 1 else "r2" if kinds == {True} else "auroc"
    if name != "loss" and name not in found:
        raise UserError(
            f"--monitor {name}: the task has no such metric; choose one of {', '.join(sorted(found))}, loss"
        )
    return name


def rank_validations(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the metrics of validations, the best first by :func:`is_better`."""

    def compare(one: dict[str, Any], other: dict[str, Any]) -> int:
        return -1 if is_better(one, other, name) else 1

    return sorted(found, key=functools.cmp_to_key(compare))


def is_better(metrics: dict[str, Any], best: dict[str, Any] | None, name: str) -> bool:
    """Return whether validation metrics improve on the best so far.

    Decided by the metric ``name``, or by the loss, which is better where it is less, where a split without both classes
    has no such metric; without any validation patients the latest is the best.  The metrics of the very step
    that ``best`` is of are better too: a run that was stopped after it saved them validates that epoch again.
    """
    if best is None or best["step"] == metrics["step"]:
        return True
    name = name if metrics[name] is not None else "loss"
    if metrics[name] is None or best[name] is None:
        return True
    return bool(metrics[name] < best[name] if name == "loss" else metrics[name] > best[name])
