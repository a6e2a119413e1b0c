"""Validation: losses, quality and collapse gauges over a split, every patient exactly once, without noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from model.prepared import PreparedBatch

from model.losses import LossCounts, LossOptions, compute_losses
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from pipeline.loading.loader import PatientLoader
from pipeline.schema import UserError
from training.collapse import CollapseGauges, is_collapsed
from training.data import BatchPreparer, ReadyBatch
from training.memory import halve, is_out_of_memory
from training.metrics import LossSums
from training.parallel import World
from training.quality import rank_predictions
from training.schedule import OptimisationOptions


def no_stop() -> None:
    """Go on: what is called between batches where nobody may stop the run."""


def forward_in_parts(
    model: SeqSetVAE, ready: ReadyBatch, world: World, optimisation: OptimisationOptions, loss: LossOptions
) -> Iterator[tuple[PreparedBatch, SeqSetVAEOutput]]:
    """Yield each part of a batch, on the device, with the model's output; a part for which memory ends is halved."""
    waiting = [*reversed(ready.parts)]
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
    loss: LossOptions,
    optimisation: OptimisationOptions,
    world: World,
    *,
    min_active_units: float,
    check_stop: Callable[[], None] = no_stop,
) -> tuple[dict[str, Any], pa.Table]:
    """Evaluate a model on a split.

    Args:
        model: in eval mode afterwards.
        loader: of the split; made with a :class:`BatchPreparer` without a seed.
        loss: what the model was trained for; parts that it does not use are not computed and None in the metrics.
        optimisation: the precision.
        world: ranks share the batches.
        min_active_units: share of active units below which the posterior counts as collapsed.
        check_stop: called between batches, alike on all ranks; may raise.

    Returns:
        The metrics, and the predictions ``patient_id, label (null = unlabelled), probability`` (null = no outcome
        head), sorted by patient; the same on every rank.

    Raises:
        UserError: the model's outputs are not finite.
    """
    model.eval()
    sums = LossSums(world.device)
    gauges = CollapseGauges(model.config.width, world.device)
    one = LossCounts(num_events=1, num_sets=1, num_labelled=1)
    ids: list[str] = []
    labels, probabilities = [np.zeros(0, np.int64)], [np.zeros(0)]
    num_events = num_sets = num_labelled = 0
    for ready in loader:
        check_stop()
        for prepared, output in forward_in_parts(model, ready, world, optimisation, loss):
            with optimisation.autocast(world.device):
                sums.add(compute_losses(output, prepared.batch.label, loss, one, beta=loss.beta))
            gauges.update(output.posterior)
            ids += prepared.batch.patient_id
            labels.append(prepared.batch.label.cpu().numpy())
            absent = np.full(prepared.batch.num_patients, np.nan)
            probabilities.append(output.probability.double().cpu().numpy() if loss.learns_outcome else absent)
        num_events, num_sets = num_events + ready.counts.num_events, num_sets + ready.counts.num_sets
        num_labelled += ready.counts.num_labelled
    world.sum(gauges.sums)
    answers = world.gather((ids, np.concatenate(labels), np.concatenate(probabilities)))
    label, probability = (np.concatenate([answer[column] for answer in answers]) for column in (1, 2))
    totals = sums.combine(world)
    if not all(np.isfinite(list(totals.values()))) or (loss.learns_outcome and not np.isfinite(probability).all()):
        raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")

    metrics: dict[str, Any] = {
        "loss": None,
        "reconstruction": totals["reconstruction"] / max(num_events, 1) if loss.learns_sets else None,
        "kl": totals["kl"] / max(num_sets, 1) if loss.learns_sets else None,
        "classification": totals["classification"] / max(num_labelled, 1) if loss.learns_outcome else None,
    }
    if num_sets:
        sets = (metrics["reconstruction"] or 0.0) + loss.beta * (metrics["kl"] or 0.0)
        outcome = metrics["classification"] or 0.0
        metrics["loss"] = loss.effective_vae_weight * sets + loss.effective_classification_weight * outcome
    ranked = rank_predictions(label, probability) if loss.learns_outcome else (None, None)
    metrics["auroc"], metrics["auprc"] = ranked
    gauge = gauges.compute()
    metrics["active_units"], metrics["mean_posterior_variance"] = gauge.active_units, gauge.mean_posterior_variance
    metrics["collapsed"] = num_sets > 0 and is_collapsed(gauge, min_active_units)
    table = pa.table(
        {
            "patient_id": pa.array([name for answer in answers for name in answer[0]], pa.string()),
            "label": pa.array(label, pa.int8(), mask=label < 0),
            "probability": pa.array(probability, pa.float64(), mask=np.isnan(probability)),
        }
    )
    return metrics, table.sort_by("patient_id")


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
