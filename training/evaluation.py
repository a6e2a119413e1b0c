"""Evaluation of a checkpoint: metrics with intervals, predictions, answers after the first hours, quality by length."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model.losses import DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT, LossOptions, chamfer_sums
from model.prepared import PreparedBatch
from model.segments import take_unique
from model.seqsetvae import SeqSetVAE, SeqSetVAEOutput
from model.set_vae import Posterior
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader
from pipeline.schema import UNLABELLED
from pipeline.storage.files import replace_atomically, write_atomically
from training.data import BatchPreparer, DataSet
from training.meds_predictions import choose_threshold, write_meds_predictions
from training.memory import StepMemory
from training.options import TrainOptions
from training.parallel import World
from training.quality import Labels, evaluate_predictions, rank_predictions
from training.validation import forward_in_parts, labels_of, validate

EARLY_HOURS = (6, 12, 24, 48)
LENGTH_BUCKETS = 4

FLOATS = pa.list_(pa.float32())
LATENTS = pa.schema([("patient_id", pa.string()), ("minute", pa.float32()), ("mu", FLOATS), ("logvar", FLOATS)])


def go_on() -> None:
    """Do nothing: what is called between batches where nobody may stop the run."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model, trained for the loss of ``options``, on the splits of a data set.

    Without ``memory`` batches have no budget; ``check_stop`` is called between them, and may raise.  ``prevalence``
    answers samples without events, see :func:`training.validation.add_empty_samples`.
    """

    options: TrainOptions
    data: DataSet
    world: World
    memory: StepMemory | None = None
    check_stop: Callable[[], None] = go_on
    prevalence: float | None = None

    def open_loader(self, split: str) -> PatientLoader:
        """Return a loader over a split, in order of length, whose batches are prepared without noise."""
        preparer = BatchPreparer(seed=None, memory=self.memory, pin=self.world.device.type == "cuda")
        seed = self.options.run.seed
        return self.data.open_loader(split, seed=seed, shuffle=False, world=self.world, preparer=preparer)

    def validate(self, model: SeqSetVAE, split: str) -> tuple[dict[str, Any], pa.Table]:
        """Return metrics and predictions of a split, see :func:`training.validation.validate`."""
        loader = self.open_loader(split)
        return validate(model, loader, self.options, self.world, self.check_stop, self.prevalence)

    def evaluate_split(self, model: SeqSetVAE, split: str) -> dict[str, Any]:
        """Return metrics of a split with bootstrap intervals; write ``predictions_<split>.parquet``.

        With ``--meds_predictions`` they are written as MEDS has them too, by a threshold of the validation split.
        """
        metrics, predictions = self.validate(model, split)
        directory, threshold = Path(self.options.run.output_dir), None
        if self.options.evaluation.meds_predictions and self.options.loss.learns_outcome:
            _, valid = self.validate(model, "valid")
            threshold = choose_threshold(labels_of(valid), valid["probability"].to_numpy())
        if self.world.is_main:
            with replace_atomically(directory / f"predictions_{split}.parquet") as path:
                pq.write_table(predictions, path, write_page_checksum=True)
            if threshold is not None:
                write_meds_predictions(directory, split, predictions, threshold)
                metrics["threshold"] = threshold
            if self.options.loss.learns_outcome:
                probability, patient_id = predictions["probability"].to_numpy(), predictions["patient_id"].to_pylist()
                metrics |= evaluate_predictions(labels_of(predictions), probability, patient_id=patient_id)
        return metrics

    @torch.no_grad()
    def evaluate_details(self, model: SeqSetVAE, split: str, latents_path: Path | None) -> dict[str, Any]:
        """Return answers after the first hours, quality by length, and the reconstruction error beside the variables'
        means; write latents of sets to ``latents_path`` (a file a rank).
        """
        model.eval()
        loss, optimisation = self.options.loss, self.options.optimisation
        errors, total_events, answers = torch.zeros(2), 0, [np.zeros((0, 3 + len(EARLY_HOURS)))]
        with pq.ParquetWriter(latents_path, LATENTS) if latents_path else nullcontext() as latents:
            for ready in self.open_loader(split):
                self.check_stop()
                for prepared, output in forward_in_parts(model, ready.parts, self.world, optimisation, loss):
                    if output.decoded is not None:
                        errors += reconstruction_sums(model, prepared, output)
                    if latents is not None:
                        latents.write_table(latent_rows(prepared.batch.to("cpu"), output.posterior))
                total_events += ready.counts.num_events
                if loss.learns_outcome:
                    answers.append(self._answer_early(model, ready.batch))
        model_error, mean_error = (self.world.sum(errors.to(self.world.device)) / max(total_events, 1)).tolist()
        label, num_events, at_end, *early = np.concatenate(self.world.gather(np.concatenate(answers))).T
        label, details = label.astype(np.int64), dict[str, Any]()
        if loss.learns_sets:
            details["reconstruction_error"] = model_error
            details["reconstruction_error_at_variable_means"] = mean_error
        if loss.learns_outcome:
            ranks = [rank_predictions(label, answer)._asdict() for answer in early]
            details["after_the_first"] = dict(zip((f"{hours} hours" for hours in EARLY_HOURS), ranks, strict=True))
            details["by_length"] = evaluate_by_length(label, at_end, num_events.astype(np.int64))
        return details

    def _answer_early(self, model: SeqSetVAE, batch: PatientBatch) -> np.ndarray:
        """Return [B, 3 + hours] float64: label, number of events, probability at the end and after the first hours."""
        columns = [batch.label.numpy(), batch.events_per_patient.numpy()]
        preparer, outcome = BatchPreparer(seed=None, memory=self.memory), LossOptions(objective="supervised")
        for view in (batch, *(first_hours(batch, hours) for hours in EARLY_HOURS)):
            parts = preparer.prepare_parts(view, step=0)
            outputs = forward_in_parts(model, parts, self.world, self.options.optimisation, outcome)
            columns.append(np.concatenate([output.probability.double().cpu().numpy() for _, output in outputs]))
        return np.column_stack(columns)


def evaluate_checkpoint(evaluator: Evaluator, model: SeqSetVAE) -> dict[str, Any]:
    """Evaluate a model on one split, write ``evaluation_<split>.json`` beside its predictions, return its content."""
    data, world, options = evaluator.data, evaluator.world, evaluator.options.evaluation
    split, output_dir = options.evaluate_split, Path(evaluator.options.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = evaluator.evaluate_split(model, split)
    suffix = "" if world.is_main else f"_rank{world.rank}"
    latents = output_dir / f"latents_{split}{suffix}.parquet" if options.export_latents else None
    content = {
        "checkpoint": options.evaluate,
        "split": split,
        "quarantined_patients": data.quarantined_patients[split],
        "quarantined_shards": data.quarantined_shards,
        **metrics,
        **evaluator.evaluate_details(model, split, latents),
    }
    if world.is_main:
        if options.baselines:
            # Imported here: fitting is slow to import, and training needs none of it.
            fit_baselines = import_module("training.baselines").fit_baselines
            seed, alone = evaluator.options.run.seed, world.alone()
            loaders = [data.open_loader(name, seed=seed, shuffle=False, world=alone) for name in ("train", split)]
            content["baselines"] = fit_baselines(*loaders, data.manifest.num_codes)
        write_atomically(output_dir / f"evaluation_{split}.json", f"{json.dumps(content, indent=1)}\n".encode())
    return content


def first_hours(batch: PatientBatch, hours: float) -> PatientBatch:
    """Return the same patients as they were so many hours after their first set.

    The model is causal, so that the contexts of the sets that stay are what they are with all sets.
    """
    start_S = batch.minute[batch.patient_offsets[:-1]][batch.patient_of_set]
    early_S = batch.minute - start_S <= 60 * hours
    return batch.keep_events(early_S[batch.set_of_event])


def reconstruction_sums(model: SeqSetVAE, prepared: PreparedBatch, output: SeqSetVAEOutput) -> Tensor:
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


def latent_rows(batch: PatientBatch, posterior: Posterior) -> pa.Table:
    """Return a row a set: whose it is, when, and the posterior of its latent."""
    ids = pa.array(batch.patient_id, pa.string()).take(pa.array(batch.patient_of_set.numpy()))
    wide = [pa.array(list(part.float().cpu().numpy()), FLOATS) for part in posterior]
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
        name = f"{num_events[inside].min()} to {num_events[inside].max()} events"
        counts = {"patients": int(inside.sum()), "positive": int(label[inside].sum())}
        result[name] = counts | rank_predictions(label[inside], probability[inside])._asdict()
    return result
