"""Evaluation of a checkpoint: metrics with intervals, predictions, answers after the first hours, quality by length."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model.losses import (
    DIRECTION_WEIGHT,
    MAGNITUDE_WEIGHT,
    SQUARED_WEIGHT,
    LossOptions,
    chamfer_sums,
)
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from model.set_vae import Posterior
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader
from pipeline.options import check_section, option
from pipeline.schema import UNLABELLED
from pipeline.storage.files import replace_atomically, write_atomically
from training.data import BatchPreparer, DataSet, ReadyBatch
from training.memory import StepMemory
from training.parallel import World
from training.quality import Labels, evaluate_predictions, rank_predictions
from training.schedule import OptimisationOptions
from training.validation import forward_in_parts, no_stop, validate

EARLY_HOURS = (6, 12, 24, 48)
LENGTH_BUCKETS = 4

LATENTS = pa.schema(
    [
        ("patient_id", pa.string()),
        ("minute", pa.float32()),
        ("mu", pa.list_(pa.float32())),
        ("logvar", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation."""

    evaluate: str | None = option(None, "Evaluate this checkpoint and do not train.")
    evaluate_split: Literal["train", "valid", "test"] = option("test", "The split that --evaluate evaluates.")
    baselines: bool = option(
        False, "With --evaluate: fit trees and logistic regression to summaries of each variable of the train split, "
        "and evaluate them on the same patients.",
    )  # fmt: skip
    export_latents: bool = option(False, "With --evaluate: write mu and logvar of each set, with patient and minute.")
    inspect: bool = option(False, "Show batches of 1, 2, 4 and 8 patients and a forward pass of each; do not train.")

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model on the splits of a data set.

    Attributes:
        data: the data set.
        world: ranks share the batches.
        loss: what the model was trained for.
        optimisation: the precision.
        seed: of the plans.
        min_active_units: share of active units below which the posterior counts as collapsed.
        memory: what a step may take; None = batches have no budget of memory.
        check_stop: called between batches; may raise.
    """

    data: DataSet
    world: World
    loss: LossOptions
    optimisation: OptimisationOptions
    seed: int
    min_active_units: float
    memory: StepMemory | None = None
    check_stop: Callable[[], None] = no_stop

    def open_loader(self, split: str) -> PatientLoader:
        """Return a loader over a split, in order of length, whose batches are prepared without noise."""
        pin = self.world.device.type == "cuda"
        preparer = BatchPreparer(seed=None, memory=self.memory, pin=pin)
        return self.data.open_loader(
            split, seed=self.seed, shuffle=False, world=self.world, memory=self.memory, transform=preparer
        )

    def validate(self, model: SeqSetVAE, loader: PatientLoader) -> tuple[dict[str, Any], pa.Table]:
        """Return metrics and predictions of a split, see :func:`training.validation.validate`."""
        settings: dict[str, Any] = {"min_active_units": self.min_active_units, "check_stop": self.check_stop}
        return validate(model, loader, self.loss, self.optimisation, self.world, **settings)

    def evaluate_split(self, model: SeqSetVAE, split: str, output_dir: Path) -> dict[str, Any]:
        """Return metrics of a split with bootstrap intervals; write ``predictions_<split>.parquet``."""
        metrics, predictions = self.validate(model, self.open_loader(split))
        if self.world.is_main:
            with replace_atomically(output_dir / f"predictions_{split}.parquet") as path:
                pq.write_table(predictions, path, write_page_checksum=True)
            if self.loss.learns_outcome:
                label = predictions["label"].fill_null(UNLABELLED).cast(pa.int64()).to_numpy()
                metrics |= evaluate_predictions(label, predictions["probability"].to_numpy())
        return metrics

    @torch.no_grad()
    def evaluate_details(self, model: SeqSetVAE, split: str, latents_path: Path | None) -> dict[str, Any]:
        """Return answers after the first hours, quality by length, and the reconstruction error beside the variables'
        means; write latents of sets to ``latents_path`` (a file a rank).
        """
        model.eval()
        label, num_events, probability, errors = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [], torch.zeros(2)
        total_events = 0
        with contextlib.ExitStack() as stack:
            latents = stack.enter_context(pq.ParquetWriter(latents_path, LATENTS)) if latents_path else None
            for ready in self.open_loader(split):
                self.check_stop()
                for prepared, output in forward_in_parts(model, ready, self.world, self.optimisation, self.loss):
                    if output.decoded is not None:
                        errors += reconstruction_sums(model, prepared.batch, output)
                    if latents is not None:
                        latents.write_table(latent_rows(prepared.batch.to("cpu"), output.posterior))
                label.append(ready.batch.label.numpy())
                num_events.append(ready.batch.events_per_patient.numpy())
                probability.append(self._answer_early(model, ready.batch))
                total_events += ready.counts.num_events
        columns = 1 + len(EARLY_HOURS)
        own = (
            np.concatenate(label),
            np.concatenate(num_events),
            np.concatenate([np.zeros((0, columns)), *probability]),
        )
        labels, lengths, probabilities = (np.concatenate(part) for part in zip(*self.world.gather(own), strict=True))
        model_error, mean_error = (self.world.sum(errors.to(self.world.device)) / max(total_events, 1)).tolist()
        details: dict[str, Any] = {}
        if self.loss.learns_sets:
            details["reconstruction_error"] = model_error
            details["reconstruction_error_at_variable_means"] = mean_error
        if self.loss.learns_outcome:
            details["after_the_first"] = {
                f"{hours} hours": dict(
                    zip(("auroc", "auprc"), rank_predictions(labels, probabilities[:, column]), strict=True)
                )
                for column, hours in enumerate(EARLY_HOURS, start=1)
            }
            details["by_length"] = evaluate_by_length(labels, probabilities[:, 0], lengths)
        return details

    def _answer_early(self, model: SeqSetVAE, batch: PatientBatch) -> np.ndarray:
        """Return [B, 1 + hours] float64: the probability at the end and after each number of first hours."""
        if not self.loss.learns_outcome:
            return np.zeros((batch.num_patients, 1 + len(EARLY_HOURS)))
        answers = []
        preparer = BatchPreparer(seed=None, memory=self.memory)
        outcome = LossOptions(objective="supervised")
        for view in (batch, *(first_hours(batch, hours) for hours in EARLY_HOURS)):
            parts = [preparer.prepare(part, 0) for part in (self.memory.split(view) if self.memory else [view])]
            ready = ReadyBatch(parts=parts, batch=view, counts=None, amounts=None)  # type: ignore[arg-type]
            outputs = forward_in_parts(model, ready, self.world, self.optimisation, outcome)
            answers.append(np.concatenate([output.probability.double().cpu().numpy() for _, output in outputs]))
        return np.stack(answers, axis=1)


def evaluate_checkpoint(
    evaluator: Evaluator, model: SeqSetVAE, options: EvaluationOptions, output_dir: Path
) -> dict[str, Any]:
    """Evaluate a model on one split, write ``evaluation_<split>.json`` beside its predictions, return its content."""
    data, world, split = evaluator.data, evaluator.world, options.evaluate_split
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = evaluator.evaluate_split(model, split, output_dir)
    suffix = "" if world.is_main else f"_rank{world.rank}"
    latents = output_dir / f"latents_{split}{suffix}.parquet" if options.export_latents else None
    details = evaluator.evaluate_details(model, split, latents)
    content = {
        "checkpoint": options.evaluate,
        "split": split,
        "quarantined_patients": data.quarantined_patients[split],
        "quarantined_shards": data.quarantined_shards,
        **metrics,
        **details,
    }
    if world.is_main:
        if options.baselines:
            content["baselines"] = evaluate_baselines(evaluator, split)
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(output_dir / f"evaluation_{split}.json", text.encode())
    return content


def evaluate_baselines(evaluator: Evaluator, split: str) -> dict[str, Any]:
    """Return what trees and logistic regression, fitted to the train split, reach on the patients of ``split``."""
    alone = evaluator.world.alone()
    fitted, evaluated = (
        evaluator.data.open_loader(name, seed=evaluator.seed, shuffle=False, world=alone) for name in ("train", split)
    )
    # Imported here: fitting is slow to import, and training needs none of it.
    return dict(import_module("training.baselines").fit_baselines(fitted, evaluated, evaluator.data.manifest.num_codes))


def first_hours(batch: PatientBatch, hours: float) -> PatientBatch:
    """Return the same patients as they were so many hours after their first set.

    The model is causal, so that the contexts of the sets that stay are what they are with all sets.
    """
    start_S = batch.minute[batch.patient_offsets[:-1]][batch.patient_of_set]
    early_S = batch.minute - start_S <= 60 * hours
    return batch.keep_events(early_S[batch.set_of_event])


def reconstruction_sums(model: SeqSetVAE, batch: PatientBatch, output: SeqSetVAEOutput) -> Tensor:
    """Return [2] float32: the reconstruction loss of the model, and that of decoding each event's own variable at its
    mean, summed over events.

    The latter is told which variables a set holds, which the decoder is not.
    """
    event = output.sets.event_of_slot
    at_mean = model.events(batch.code[event], torch.zeros_like(batch.value[event]), batch.has_value[event])
    assert output.decoded is not None
    weights = torch.tensor([DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT])
    sums = [torch.stack(chamfer_sums(output.events, each, output.sets)) for each in (output.decoded, at_mean)]
    return torch.stack([each.cpu() @ weights for each in sums])


def latent_rows(batch: PatientBatch, posterior: Posterior) -> pa.Table:
    """Return a row a set: whose it is, when, and the posterior of its latent."""
    ids = pa.array(batch.patient_id, pa.string()).take(pa.array(batch.patient_of_set.numpy()))
    wide = [pa.array(list(part.float().cpu().numpy()), LATENTS.field("mu").type) for part in posterior]
    return pa.table([ids, pa.array(batch.minute.numpy()), *wide], schema=LATENTS)


def evaluate_by_length(label: Labels, probability: np.ndarray, num_events: Labels) -> dict[str, dict[str, Any]]:
    """Return AUROC and AUPRC of the labelled patients in ``LENGTH_BUCKETS`` ranges of ``num_events`` of equal mass."""
    labelled = label != UNLABELLED
    label, probability, num_events = label[labelled], probability[labelled], num_events[labelled]
    if not len(label):
        return {}
    edges = np.quantile(num_events, np.linspace(0, 1, LENGTH_BUCKETS + 1)[1:-1])
    bucket, result = np.searchsorted(edges, num_events), {}
    for number in np.unique(bucket):
        inside = bucket == number
        auroc, auprc = rank_predictions(label[inside], probability[inside])
        name = f"{num_events[inside].min()} to {num_events[inside].max()} events"
        counts = {"patients": int(inside.sum()), "positive": int(label[inside].sum())}
        result[name] = {**counts, "auroc": auroc, "auprc": auprc}
    return result
