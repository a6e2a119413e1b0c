"""Validation: losses, quality and collapse gauges over a split, every patient exactly once, without noise."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.losses import LossCounts, LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from pipeline.loading.batch import PredictionTime
from pipeline.loading.loader import PatientLoader
from pipeline.machine import release_free_memory
from pipeline.schema import PREDICTION_MINUTE, PREDICTION_TIME, UNLABELLED, UserError
from training.collapse import CollapseGauges, is_collapsed
from training.data import BatchPreparer
from training.memory import halve, is_out_of_memory
from training.metrics import LossSums
from training.options import TrainOptions
from training.parallel import World
from training.quality import Ranks, rank_predictions
from training.schedule import OptimisationOptions


def forward_in_parts(
    model: SeqSetVAE, parts: list[PreparedBatch], world: World, optimisation: OptimisationOptions, loss: LossOptions
) -> Iterator[tuple[PreparedBatch, SeqSetVAEOutput]]:
    """Yield each part of a batch, on the device, with the model's output; a part for which memory ends is halved."""
    waiting = parts[::-1]
    release_free_memory()  # batches in order of length leave gaps that fit none of the next
    while waiting:
        part, output = waiting.pop(), None
        try:
            with optimisation.autocast(world.device):
                prepared = part.to(world.device)
                output = model(prepared, reconstruct=loss.learns_sets, classify=loss.learns_outcome)
        except RuntimeError as error:
            if part.batch.num_patients <= 1 or not is_out_of_memory(error):
                raise
        if output is None:
            waiting += [BatchPreparer(seed=None).prepare(half, 0) for half in reversed(halve(part.batch))]
        else:
            yield prepared, output


@torch.no_grad()
def validate(
    model: SeqSetVAE,
    loader: PatientLoader,
    options: TrainOptions,
    world: World,
    check_stop: Callable[[], None],
    prevalence: float | None = None,
) -> tuple[dict[str, Any], pa.Table]:
    """Evaluate a model on a split, and leave it in eval mode.

    The ``loader`` is made with a :class:`BatchPreparer` without a seed; ``check_stop`` is called between batches, alike
    on all ranks, and may raise.

    Returns:
        The metrics (None where the objective does not use one), and the predictions ``patient_id, prediction_time
        (where the task has some), label (null = unlabelled), probability (null = no outcome head)``, sorted by patient
        and time; the same on every rank.  A sample without events is answered with ``prevalence``.
    """
    model.eval()
    loss, optimisation = options.loss, options.optimisation
    sums, gauges = LossSums(world.device), CollapseGauges(model.config.width, world.device)
    one = LossCounts(num_events=1, num_sets=1, num_labelled=1)
    counts = Counter[str]()
    times = loader.task.times if loader.task else None
    predictions = [predictions_of([], [], np.zeros(0, np.int64), np.zeros(0), times)]
    for ready in loader:
        check_stop()
        for prepared, output in forward_in_parts(model, ready.parts, world, optimisation, loss):
            with optimisation.autocast(world.device):
                sums.add(compute_losses(output, prepared.batch.label, loss, one, beta=loss.beta))
            gauges.update(output.posterior)
            label = prepared.batch.label.cpu().numpy()
            probability = output.probability.double().cpu().numpy() if loss.learns_outcome else label * np.nan
            of_samples = prepared.batch.patient_id, prepared.batch.prediction_time
            predictions.append(predictions_of(*of_samples, label, probability, times))
        counts.update(dataclasses.asdict(ready.counts))
    world.sum(gauges.sums)
    table = pa.concat_tables([part for rank in world.gather(predictions) for part in rank])
    table = add_empty_samples(table, loader, prevalence if loss.learns_outcome else None)
    totals = sums.combine(world)
    if not np.isfinite([*totals.values()]).all() or (loss.learns_outcome and table["probability"].null_count):
        raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")
    gauge = gauges.compute()
    return {
        **mean_losses(totals, counts, loss),
        **rank_table(table),
        "active_units": gauge.active_units,
        "mean_posterior_variance": gauge.mean_posterior_variance,
        "collapsed": counts["num_sets"] > 0 and is_collapsed(gauge, options.run.min_active_units),
    }, table


TIME_TYPES = {"date": pa.timestamp("us"), "minute": pa.float64()}


def predictions_of(
    patient_id: list[str],
    prediction_time: list[PredictionTime] | None,
    label: npt.NDArray[np.int64],
    probability: npt.NDArray[Any],
    times: str | None,
) -> pa.Table:
    """Return a table of predictions; a label of -1 and a probability that is not a number become null."""
    columns: dict[str, Any] = {"patient_id": pa.array(patient_id, pa.string())}
    if times is not None:
        columns["prediction_time"] = pa.array(prediction_time, TIME_TYPES[times])
    columns["label"] = pa.array(label, pa.int8(), mask=label < 0)
    return pa.table(columns | {"probability": pa.array(probability, pa.float64(), from_pandas=True)})


def add_empty_samples(table: pa.Table, loader: PatientLoader, prevalence: float | None) -> pa.Table:
    """Return predictions in order, with those of samples before their patient's first event.

    All that is known of these is how frequent the outcome was in training: ``prevalence``, or that of the task's train
    split; where neither is known, the mean of the other predictions.
    """
    empty, task = loader.read_empty_samples(), loader.task
    keys = [(name, "ascending") for name in table.column_names[:-2]]
    if not empty.num_rows or task is None:
        return table.sort_by(keys)
    answer = task.prevalence() if prevalence is None else prevalence
    if answer is None:
        answer = pc.mean(table["probability"]).as_py()
    columns = {"patient_id": empty["patient_id"], "label": empty["label"]}
    if task.times is not None:
        columns["prediction_time"] = empty[PREDICTION_TIME if task.times == "date" else PREDICTION_MINUTE]
    columns["probability"] = pa.array([answer] * empty.num_rows, pa.float64())
    return pa.concat_tables([table, pa.table(columns).select(table.column_names)]).sort_by(keys)


def labels_of(predictions: pa.Table) -> npt.NDArray[np.int64]:
    """Return the labels of a table of predictions, [P]; -1 = unlabelled."""
    return predictions["label"].fill_null(UNLABELLED).cast(pa.int64()).to_numpy()


def rank_table(predictions: pa.Table) -> dict[str, float | None]:
    """Return AUROC and AUPRC of a table of predictions; None where they are undefined."""
    if predictions["probability"].null_count:
        return Ranks(None, None)._asdict()
    return rank_predictions(labels_of(predictions), predictions["probability"].to_numpy())._asdict()


def mean_losses(totals: dict[str, float], counts: dict[str, int], loss: LossOptions) -> dict[str, float | None]:
    """Return the loss and its parts, each sum divided by its count; None for parts that the objective does not use."""
    divisors = {"reconstruction": "num_events", "kl": "num_sets", "classification": "num_labelled"}
    means = {name: totals[name] / max(counts[count], 1) for name, count in divisors.items()}
    total = loss.effective_vae_weight * (means["reconstruction"] + loss.beta * means["kl"])
    total += loss.effective_classification_weight * means["classification"]
    used = {"reconstruction": loss.learns_sets, "kl": loss.learns_sets, "classification": loss.learns_outcome}
    parts = {name: mean if used[name] else None for name, mean in means.items()}
    return {"loss": total if counts["num_sets"] else None, **parts}


def is_better(metrics: dict[str, Any], best: dict[str, Any] | None, name: str) -> bool:
    """Return whether validation metrics improve on the best so far.

    Decided by the metric ``name`` (``loss``, ``auroc`` or ``auprc``), or by the loss where a split without both
    outcomes has no such metric; without any validation patients the latest is the best.  The metrics of the very step
    that ``best`` is of are better too: a run that was stopped after it saved them validates that epoch again.
    """
    if best is None or best["step"] == metrics["step"]:
        return True
    name = name if metrics[name] is not None else "loss"
    if metrics[name] is None or best[name] is None:
        return True
    return bool(metrics[name] < best[name] if name == "loss" else metrics[name] > best[name])
