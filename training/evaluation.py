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

from model.average import TrainedModel
from model.config import Outcome
from model.losses import DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT, LossOptions
from model.prepared import PreparedBatch
from model.reconstruction import chamfer_sums
from model.segments import take_unique
from model.seqsetvae import SeqSetVAEOutput
from pipeline.arrays import is_labelled
from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader
from pipeline.storage.files import write_atomically
from training.calibration import measure_conformal
from training.data import BatchPreparer, DataSet
from training.decisions import measure_decisions
from training.latents import LATENTS, LatentSums, latent_rows
from training.meds_predictions import choose_threshold, write_meds_predictions
from training.memory import StepMemory
from training.options import TrainOptions
from training.parallel import World
from training.predictions import labels_of, labels_of_batch, probabilities_of, values_of, write_predictions
from training.quality import HEADLINES, Floats, Ints, evaluate_predictions, rank_predictions
from training.subgroups import Grouping, evaluate_subgroups, group_patients
from training.validation import Validation, forward_in_parts, join_tasks, validate

EARLY_HOURS = (6, 12, 24, 48)
LENGTH_BUCKETS = 4


@dataclass(frozen=True, slots=True)
class Quality:
    """Metrics of a split, and those of each outcome."""

    metrics: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    of_tasks: list[dict[str, Any]]

    def join(self, other: Quality) -> Quality:
        """Return these metrics with others of the same outcomes."""
        of_tasks = [own | more for own, more in zip(self.of_tasks, other.of_tasks, strict=True)]
        return Quality(self.metrics | other.metrics, self.outcomes, of_tasks)

    def flatten(self) -> dict[str, Any]:
        """Return them as one dictionary; see :func:`training.validation.join_tasks`."""
        return join_tasks(self.metrics, self.outcomes, self.of_tasks)


def go_on() -> None:
    """Do nothing: what is called between batches where nobody may stop the run."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model, trained for the loss of ``options``, on the splits of a data set.

    Without ``memory`` batches have no budget; ``check_stop`` is called between them, and may raise.
    """

    options: TrainOptions
    data: DataSet
    world: World
    memory: StepMemory | None = None
    check_stop: Callable[[], None] = go_on

    def open_loader(self, split: str) -> PatientLoader:
        """Return a loader over a split, in order of length, whose batches are prepared without noise."""
        preparer = BatchPreparer(seed=None, memory=self.memory, pin=self.world.device.type == "cuda")
        seed = self.options.run.seed
        return self.data.open_loader(split, seed=seed, shuffle=False, world=self.world, preparer=preparer)

    def validate(self, model: TrainedModel, split: str) -> Validation:
        """Return metrics and predictions of a split, see :func:`training.validation.validate`."""
        return validate(model, self.open_loader(split), self.options, self.world, self.check_stop)

    def evaluate_split(self, model: TrainedModel, split: str) -> Quality:
        """Return metrics of a split, on the first rank with bootstrap intervals; write its predictions.

        They are in ``predictions_<split>.parquet``, of several tasks in ``predictions_<split>_<task>.parquet``.  With
        ``--meds_predictions`` they are written as MEDS has them too, by a threshold of the validation split.
        """
        found = self.validate(model, split)
        of_tasks = [dict[str, Any]() for _ in found.outcomes]
        directory, threshold = Path(self.options.run.output_dir), None
        if self.options.evaluation.meds_predictions and self.options.loss.learns_outcome:
            valid, binary = self.validate(model, "valid").tables[0], found.outcomes[0]
            threshold = choose_threshold(labels_of(valid, binary), values_of(valid, binary))
        if not self.world.is_main:
            return Quality(found.metrics, found.outcomes, of_tasks)
        for outcome, table, metrics in zip(found.outcomes, found.tables, of_tasks, strict=True):
            write_predictions(predictions_file(directory, split, outcome, found.outcomes), table)
            if threshold is not None:
                write_meds_predictions(directory, split, table, threshold)
                metrics["threshold"] = threshold
            if self.options.loss.learns_outcome:
                metrics |= judge_table(table, outcome)
            else:
                metrics |= dict.fromkeys(HEADLINES[outcome.kind])
        return Quality(found.metrics, found.outcomes, of_tasks)

    @torch.no_grad()
    def evaluate_details(self, model: TrainedModel, split: str, latents_path: Path | None) -> Quality:
        """Return answers after the first hours, quality by length, and the reconstruction error beside the variables'
        means; write latents of sets to ``latents_path`` (a file a rank), and a page about them.
        """
        model.eval()
        loss, optimisation, outcomes = self.options.loss, self.options.optimisation, model.config.outcomes
        outputs = sum(outcome.num_outputs for outcome in outcomes)
        no_answers = np.zeros((0, 1 + len(outcomes) + outputs * (1 + len(EARLY_HOURS))))
        errors, total_events, answers = torch.zeros(2), 0, [no_answers]
        sums = LatentSums(model.config.width, model.config.num_codes) if latents_path else None
        with pq.ParquetWriter(latents_path, LATENTS) if latents_path else nullcontext() as latents:
            for ready in self.open_loader(split):
                self.check_stop()
                for prepared, output in forward_in_parts(model, ready.parts, self.world, optimisation, loss):
                    if output.decoded is not None:
                        errors += reconstruction_sums(model, prepared, output)
                    if sums is not None and latents is not None:
                        sums.add(prepared, output)
                        latents.write_table(latent_rows(prepared.batch.to("cpu"), output.posterior))
                total_events += ready.counts.num_events
                if loss.learns_outcome:
                    answers.append(self._answer_early(model, ready.batch))
        model_error, mean_error = (self.world.sum(errors.to(self.world.device)) / max(total_events, 1)).tolist()
        details = dict[str, Any]()
        if loss.learns_sets:
            details["reconstruction_error"] = model_error
            details["reconstruction_error_at_variable_means"] = mean_error
        if sums is not None:
            details |= self._describe_latents(sums, split)
        columns = np.concatenate(self.world.gather(np.concatenate(answers)))
        of_tasks = _judge_answers(columns, outcomes) if loss.learns_outcome else [dict[str, Any]() for _ in outcomes]
        return Quality(details, outcomes, of_tasks)

    def _describe_latents(self, sums: LatentSums, split: str) -> dict[str, Any]:
        """Return what the latents of a split are like; on the first rank write ``latents_<split>.html``."""
        sums.combine(self.world)
        variables = read_vocabulary(self.data.folder, self.data.manifest)["variable"].to_pylist()
        found = sums.summarize(variables)
        if self.world.is_main:
            sums.write_page(Path(self.options.run.output_dir) / f"latents_{split}.html", found, f"split {split}")
        return found

    def _answer_early(self, model: TrainedModel, batch: PatientBatch) -> Floats:
        """Return [B, ·] float64: the number of events, the labels of tasks (NaN = unlabelled), then what is predicted
        of each at the end, and after the first hours.
        """
        columns = [batch.events_per_patient.numpy(), *labels_of_batch(batch, len(model.config.outcomes))]
        preparer, outcome = BatchPreparer(seed=None, memory=self.memory), LossOptions(objective="supervised")
        for view in (batch, *(first_hours(batch, hours) for hours in EARLY_HOURS)):
            parts = preparer.prepare_parts(view, step=0)
            outputs = forward_in_parts(model, parts, self.world, self.options.optimisation, outcome)
            columns.append(np.concatenate([torch.cat(o.predictions, 1).double().cpu().numpy() for _, o in outputs]))
        return np.column_stack(columns)


def judge_table(table: pa.Table, outcome: Outcome) -> dict[str, Any]:
    """Return the metrics of a table of predictions; of a binary outcome also what acting on them brings, and where
    conformal sets were fitted their coverage.
    """
    label, prediction = labels_of(table, outcome), values_of(table, outcome)
    metrics = evaluate_predictions(label, prediction, outcome, patient_id=table["patient_id"].to_pylist())
    if outcome.kind == "binary":
        known = is_labelled(label)
        metrics |= measure_decisions(label[known].astype(np.int64), prediction[known])
    if outcome.conformal:
        sets = measure_conformal(label, probabilities_of(table, outcome), outcome.conformal, outcome.classes)
        metrics["conformal"] = sets
    return metrics


def _judge_answers(columns: Floats, outcomes: tuple[Outcome, ...]) -> list[dict[str, Any]]:
    """Return the quality of each task's answers after the first hours, and by length; see ``_answer_early``."""
    num_events, labels = columns[:, 0].astype(np.int64), columns[:, 1 : 1 + len(outcomes)]
    views = np.split(columns[:, 1 + len(outcomes) :], 1 + len(EARLY_HOURS), axis=1)
    found, start = [], 0
    for outcome, label in zip(outcomes, labels.T, strict=True):
        own = slice(start, start := start + outcome.num_outputs)
        at_end, *early = (view[:, own] if outcome.kind == "multiclass" else view[:, own][:, -1] for view in views)
        ranks = [rank_predictions(label, answer, outcome) for answer in early]
        after = dict(zip((f"{hours} hours" for hours in EARLY_HOURS), ranks, strict=True))
        found.append({"after_the_first": after, "by_length": evaluate_by_length(label, at_end, num_events, outcome)})
    return found


def evaluate_checkpoint(evaluator: Evaluator, model: TrainedModel) -> dict[str, Any]:
    """Evaluate a model on one split, write ``evaluation_<split>.json`` beside its predictions, return its content."""
    data, world, options = evaluator.data, evaluator.world, evaluator.options.evaluation
    split, output_dir = options.evaluate_split, Path(evaluator.options.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    quality = evaluator.evaluate_split(model, split)
    suffix = "" if world.is_main else f"_rank{world.rank}"
    latents = output_dir / f"latents_{split}{suffix}.parquet" if options.export_latents else None
    quality = quality.join(evaluator.evaluate_details(model, split, latents))
    content = {
        "checkpoint": options.evaluate,
        "split": split,
        "quarantined_patients": data.quarantined_patients[split],
        "quarantined_shards": data.quarantined_shards,
    }
    if world.is_main:
        if options.subgroups and evaluator.options.loss.learns_outcome:
            quality = quality.join(_judge_subgroups(evaluator, quality.outcomes))
        if options.baselines:
            # Imported here: fitting is slow to import, and training needs none of it.
            fit_baselines = import_module("training.baselines").fit_baselines
            seed, alone = evaluator.options.run.seed, world.alone()
            loaders = [data.open_loader(name, seed=seed, shuffle=False, world=alone) for name in ("train", split)]
            fitted = fit_baselines(*loaders, data.manifest.num_codes, model.config.outcomes)
            quality = quality.join(Quality({}, quality.outcomes, [{"baselines": each} for each in fitted]))
        content |= quality.flatten()
        write_atomically(output_dir / f"evaluation_{split}.json", f"{json.dumps(content, indent=1)}\n".encode())
    return content


def _judge_subgroups(evaluator: Evaluator, outcomes: tuple[Outcome, ...]) -> Quality:
    """Return the metrics of the subgroups that ``--subgroups`` names, of the predictions that were just written."""
    data, options = evaluator.data, evaluator.options.evaluation
    split, directory = options.evaluate_split, Path(evaluator.options.run.output_dir)
    loader = data.open_loader(split, seed=0, shuffle=False, world=evaluator.world.alone())
    groupings = [Grouping.parse(text) for text in options.subgroups]
    groups, found = group_patients(loader, groupings, read_vocabulary(data.folder, data.manifest)), []
    for outcome in outcomes:
        table = pq.read_table(predictions_file(directory, split, outcome, outcomes))
        columns = table["patient_id"].to_pylist(), labels_of(table, outcome), values_of(table, outcome)
        found.append({"subgroups": evaluate_subgroups(groups, *columns, outcome)})
    return Quality({}, outcomes, found)


def predictions_file(directory: Path, split: str, outcome: Outcome, outcomes: tuple[Outcome, ...]) -> Path:
    """Return where the predictions of an outcome are written, of one of several in a file of its own."""
    suffix = f"_{outcome.name}" if len(outcomes) > 1 else ""
    return directory / f"predictions_{split}{suffix}.parquet"


def first_hours(batch: PatientBatch, hours: float) -> PatientBatch:
    """Return the same patients as they were so many hours after their first set.

    The model is causal, so that the contexts of the sets that stay are what they are with all sets.
    """
    start_S = batch.minute[batch.patient_offsets[:-1]][batch.patient_of_set]
    early_S = batch.minute - start_S <= 60 * hours
    return batch.keep_events(early_S[batch.set_of_event])


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
