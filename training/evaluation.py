"""Evaluation of a checkpoint: metrics with intervals, predictions, and the details of a split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.average import TrainedModel
from model.config import Outcome
from pipeline.arrays import is_labelled
from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.loader import PatientLoader
from pipeline.storage.files import write_atomically
from training.calibration import measure_conformal
from training.data import BatchPreparer, DataSet
from training.decisions import measure_decisions
from training.details import Details
from training.latents import LatentSums
from training.meds_predictions import choose_threshold, write_meds_predictions
from training.memory import StepMemory
from training.options import TrainOptions
from training.parallel import World
from training.predictions import labels_of, probabilities_of, values_of, write_predictions
from training.quality import HEADLINES, evaluate_predictions
from training.subgroups import Grouping, evaluate_subgroups, group_patients
from training.validation import Validation, join_tasks, validate


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

    def open_loader(self, split: str, hours: tuple[float, ...] = ()) -> PatientLoader:
        """Return a loader over a split, in order of length, whose batches are prepared without noise, and with answers
        after the ``hours``.
        """
        preparer = BatchPreparer(seed=None, memory=self.memory, pin=self.world.device.type == "cuda", hours=hours)
        seed = self.options.run.seed
        return self.data.open_loader(split, seed=seed, shuffle=False, world=self.world, preparer=preparer)

    def validate(self, model: TrainedModel, split: str, details: Details | None = None) -> Validation:
        """Return metrics and predictions of a split, see :func:`training.validation.validate`."""
        loader = self.open_loader(split, details.hours if details else ())
        return validate(model, loader, self.options, self.world, self.check_stop, details)

    def evaluate_split(self, model: TrainedModel, split: str, details: Details | None = None) -> Quality:
        """Return metrics of a split, on the first rank with bootstrap intervals; write its predictions; gather
        ``details``.

        They are in ``predictions_<split>.parquet``, of several tasks in ``predictions_<split>_<task>.parquet``.  With
        ``--meds_predictions`` they are written as MEDS has them too, by a threshold of the validation split.
        """
        found = self.validate(model, split, details)
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


def evaluate_checkpoint(evaluator: Evaluator, model: TrainedModel) -> dict[str, Any]:
    """Evaluate a model on one split, write ``evaluation_<split>.json`` beside its predictions, return its content."""
    data, world, options = evaluator.data, evaluator.world, evaluator.options.evaluation
    split, output_dir = options.evaluate_split, Path(evaluator.options.run.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    suffix = "" if world.is_main else f"_rank{world.rank}"
    latents = output_dir / f"latents_{split}{suffix}.parquet" if options.export_latents else None
    with Details(model, evaluator.options.loss, latents) as details:
        quality = evaluator.evaluate_split(model, split, details)
    metrics, of_tasks = details.summarize(world)
    if details.latents is not None:
        metrics |= _describe_latents(evaluator, details.latents)
    quality = quality.join(Quality(metrics, quality.outcomes, of_tasks))
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


def _describe_latents(evaluator: Evaluator, sums: LatentSums) -> dict[str, Any]:
    """Return what the latents of the split are like; on the first rank write ``latents_<split>.html``."""
    sums.combine(evaluator.world)
    split = evaluator.options.evaluation.evaluate_split
    variables = read_vocabulary(evaluator.data.folder, evaluator.data.manifest)["variable"].to_pylist()
    found = sums.summarize(variables)
    if evaluator.world.is_main:
        directory = Path(evaluator.options.run.output_dir)
        sums.write_page(directory / f"latents_{split}.html", found, f"split {split}")
    return found


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
