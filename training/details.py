"""What evaluation gathers of each batch beside predictions: answers over the first hours, quality by length,
reconstruction beside the variables' means, and latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model.average import TrainedModel
from model.config import Outcome
from model.losses import DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT, LossOptions
from model.prepared import PreparedBatch
from model.reconstruction import chamfer_sums
from model.segments import take_unique
from model.seqsetvae import SeqSetVAEOutput
from pipeline.arrays import is_labelled
from training.decisions import measure_first_alerts
from training.latents import LATENTS, LatentSums, latent_rows
from training.parallel import World
from training.predictions import labels_of_batch
from training.quality import Floats, Ints, rank_predictions

ANSWER_HOURS = tuple(range(3, 49, 3))
"""Hours after a patient's first set at which answers are computed, all in the pass that answers at the end."""

EARLY_HOURS = (6, 12, 24, 48)
"""Those of which the quality is told."""

LENGTH_BUCKETS = 4


class Details:
    """Gathers what is told of a split, batch by batch, on each rank; a context that the file of latents is open in.

    Args:
        model: in eval mode.
        loss: what it learned.
        latents_path: a Parquet file for the latents of sets, on each rank another; None = they are not gathered.
    """

    def __init__(self, model: TrainedModel, loss: LossOptions, latents_path: Path | None) -> None:
        self.model, self.loss = model, loss
        self.hours = ANSWER_HOURS if loss.learns_outcome else ()
        outcomes = model.config.outcomes
        width = 1 + len(outcomes) + sum(outcome.num_outputs for outcome in outcomes) * (1 + len(self.hours))
        self.errors, self.num_events = torch.zeros(2, dtype=torch.float64), 0
        self.answers = [np.zeros((0, width))]
        self.latents = LatentSums(model.config.width, model.config.num_codes) if latents_path else None
        self._file = pq.ParquetWriter(latents_path, LATENTS) if latents_path else None

    def __enter__(self) -> Details:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, prepared: PreparedBatch, output: SeqSetVAEOutput) -> None:
        """Add a part of a batch that was prepared with answers after the ``hours``."""
        self.num_events += prepared.batch.num_events
        if output.decoded is not None:
            self.errors += reconstruction_sums(self.model, prepared, output)
        if self.latents is not None and self._file is not None:
            self.latents.add(prepared, output)
            self._file.write_table(latent_rows(prepared.batch.to("cpu"), output.posterior))
        if output.logits is not None:
            self.answers.append(_answer_rows(prepared, output, 1 + len(self.hours)))

    def summarize(self, world: World) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what was found on all ranks of the split, and of each task."""
        sums = torch.cat([self.errors, torch.tensor([self.num_events], dtype=torch.float64)])
        *errors, num_events = world.sum(sums.to(world.device)).tolist()
        details = dict[str, Any]()
        if self.loss.learns_sets:
            names = "reconstruction_error", "reconstruction_error_at_variable_means"
            details = {name: error / max(num_events, 1) for name, error in zip(names, errors, strict=True)}
        rows, outcomes = np.concatenate(world.gather(np.concatenate(self.answers))), self.model.config.outcomes
        if not self.loss.learns_outcome:
            return details, [dict[str, Any]() for _ in outcomes]
        return details, judge_answers(rows, outcomes, self.hours)


def _answer_rows(prepared: PreparedBatch, output: SeqSetVAEOutput, views: int) -> Floats:
    """Return [B, ·] float64: the number of events, the labels of tasks (NaN = unlabelled), then for each of the views
    what is predicted of each task, first at the end; of samples that share events the longest alone.
    """
    batch = prepared.batch.to("cpu")
    at_end = batch.whole_samples.numpy()
    columns = [batch.events_per_patient.numpy(), *(own[at_end] for own in labels_of_batch(batch, output.outcomes))]
    predictions = torch.cat(output.predictions, 1).double().cpu().numpy()
    early = np.split(predictions[batch.num_samples :], views - 1)
    return np.column_stack([*columns, predictions[at_end], *early])


def judge_answers(rows: Floats, outcomes: tuple[Outcome, ...], hours: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return for each task the quality of answers after ``EARLY_HOURS`` and by length, and of a binary one the hours of
    the first alerts.

    Args:
        rows: of each patient the number of events, the label of each task, then the predictions of each task at the
            end and after each of the ``hours``.
        outcomes: of the tasks.
        hours: which must hold ``EARLY_HOURS``.
    """
    num_events, labels = rows[:, 0].astype(np.int64), rows[:, 1 : 1 + len(outcomes)]
    views = np.split(rows[:, 1 + len(outcomes) :], 1 + len(hours), axis=1)
    found, start = [], 0
    for outcome, label in zip(outcomes, labels.T, strict=True):
        own = slice(start, start := start + outcome.num_outputs)
        at_end, *early = (view[:, own] if outcome.kind == "multiclass" else view[:, own][:, -1] for view in views)
        after = {
            f"{hour} hours": rank_predictions(label, answer, outcome)
            for hour, answer in zip(hours, early, strict=True)
            if hour in EARLY_HOURS
        }
        quality = {"after_the_first": after, "by_length": evaluate_by_length(label, at_end, num_events, outcome)}
        if outcome.kind == "binary":
            known = is_labelled(label)
            answers = np.stack(early)[:, known]
            quality["first_alerts"] = measure_first_alerts(label[known].astype(np.int64), answers, hours)
        found.append(quality)
    return found


def reconstruction_sums(model: TrainedModel, prepared: PreparedBatch, output: SeqSetVAEOutput) -> Tensor:
    """Return [2] float32: the reconstruction loss of the model, and that of decoding each event's own variable at its
    mean, summed over events.

    The latter is told which variables a set holds, which the decoder is not.
    """
    embedding_UE = take_unique(model.events.embedding, prepared.codes)
    at_mean = model.events(embedding_UE, prepared.slots_of_code, torch.zeros_like(prepared.value), prepared.has_number)
    assert output.decoded is not None
    weights = torch.tensor([DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT])
    sums = [torch.stack(chamfer_sums(output.events, each, output.sets)) for each in (output.decoded, at_mean)]
    return torch.stack([each.cpu() @ weights for each in sums])


def evaluate_by_length(label: Floats, prediction: Floats, num_events: Ints, outcome: Outcome) -> dict[str, Any]:
    """Return the headlines of the labelled patients in ``LENGTH_BUCKETS`` ranges of ``num_events`` of equal mass."""
    labelled = is_labelled(label)
    label, prediction, num_events = label[labelled], prediction[labelled], num_events[labelled]
    if not len(label):
        return {}
    edges = np.quantile(num_events, np.linspace(0, 1, LENGTH_BUCKETS + 1)[1:-1])
    bucket, result = np.searchsorted(edges, num_events), {}
    for number in np.unique(bucket):
        inside = bucket == number
        name = f"{num_events[inside].min()} to {num_events[inside].max()} events"
        counts = {"patients": int(inside.sum())}
        if outcome.kind == "binary":
            counts["positive"] = int(label[inside].sum())
        result[name] = counts | rank_predictions(label[inside], prediction[inside], outcome)
    return result
