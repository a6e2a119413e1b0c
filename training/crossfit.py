"""Cross-fitting: what out-of-fold predictions decide, and the final models as one checkpoint.

Every model is a run of its own in ``RUN/members``.  The models of folds leave what they predict after each epoch; the
epoch at which the pooled predictions, recalibrated, have the least loss is where the final models stop, and the
recalibration that fits these predictions best is the final model's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from model.config import SMALLEST_PROBABILITY, Outcome, SeqSetVAEConfig
from model.losses import LossOptions
from pipeline.arrays import is_labelled
from pipeline.dataset.tasks import common_times
from pipeline.options import to_dict
from pipeline.schema import Times, UserError
from pipeline.storage.files import write_atomically
from training.calibration import fit_calibration, fit_conformal
from training.card import is_summary_of, write_model_cards, write_summary
from training.checkpoint import Checkpoint
from training.console import format_quality, log_main
from training.data import DataSet
from training.evaluation import Evaluator, judge_table, predictions_file
from training.folds import final_members, fold_members, members_folder
from training.options import TrainOptions
from training.parallel import World
from training.predictions import (
    labels_of,
    make_table,
    probabilities_of,
    sort_samples,
    write_predictions,
)
from training.report import write_run_report
from training.validation import Validation, join_tasks

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """What the models of folds say together.

    Attributes:
        epochs: number of epochs with the least loss.
        curve: that loss after each epoch.
        outcomes: what is predicted, with the recalibration.
        tables: of each outcome the predictions after ``epochs``, the mean over deals, not recalibrated.
    """

    epochs: int
    curve: list[float]
    outcomes: tuple[Outcome, ...]
    tables: list[pa.Table]

    def summarize(self) -> dict[str, Any]:
        """Return the quality of the predictions, with intervals, and what they decided."""
        of_tasks = []
        for outcome, table in zip(self.outcomes, self.tables, strict=True):
            quality = judge_table(table, dataclasses.replace(outcome, conformal=()))  # they were fitted to these
            of_tasks.append(quality | {"calibration": list(outcome.calibration)})
        decided = {"epochs": self.epochs, "loss_by_epoch": self.curve}
        return join_tasks(decided, self.outcomes, of_tasks)


def check_cross_fit(options: TrainOptions, world: World) -> None:
    """Raise UserError where the folder holds another kind of run, or cross-fitting without ``--resume``."""
    directory = Path(options.run.output_dir)
    if options.cross_fit.parallel_models > 1 and world.size > 1:
        raise UserError("--parallel_models starts its own processes; start one, without torchrun")
    if (directory / "checkpoints" / "last.pt").exists():
        raise UserError(f"--output_dir {directory} holds a run of one model; name another for --folds or --final_seeds")
    if members_folder(options).exists() and not options.run.resume:
        raise UserError(f"--output_dir {directory} holds cross-fitting; --resume goes on with it, or name another")
    world.wait()


def keep_predictions(directory: Path, epoch: int, found: Validation) -> None:
    """Write what the model of a fold predicts after ``epoch``, for each outcome."""
    (directory / "out_of_fold").mkdir(exist_ok=True)
    for outcome, table in zip(found.outcomes, found.tables, strict=True):
        write_predictions(_predictions_file(directory, epoch, outcome), table)


def _predictions_file(directory: Path, epoch: int, outcome: Outcome) -> Path:
    return directory / "out_of_fold" / f"{outcome.name}_epoch_{epoch}.parquet"


def join_folds(options: TrainOptions, data: DataSet) -> OutOfFold:
    """Return what the models of all folds say together; each must have ended."""
    outcomes, times = data.outcomes, common_times(data.tasks)
    curve: list[float] = []
    best: OutOfFold | None = None
    for epoch in range(options.optimisation.num_epochs):
        tables = [_join_epoch(options, epoch, outcome, times) for outcome in outcomes]
        joined = [table for table in tables if table is not None]
        if len(joined) < len(outcomes):
            break  # a fold ended by --patience, or has collapsed
        fitted = tuple(map(_calibrate, outcomes, joined))
        curve.append(_pooled_loss(joined, fitted, options.loss))
        if best is None or curve[-1] < min(curve[:-1]):
            best = OutOfFold(epochs=epoch + 1, curve=curve, outcomes=fitted, tables=joined)
    if best is None:
        raise UserError(f"{members_folder(options)}: a fold's predictions are missing; remove its folder, and --resume")
    return best


def _calibrate(outcome: Outcome, table: pa.Table) -> Outcome:
    """Return an outcome with the recalibration and the conformal sets that fit predictions best."""
    if outcome.kind == "regression":
        return outcome
    label = labels_of(table, outcome)
    outcome = dataclasses.replace(outcome, calibration=fit_calibration(label, probabilities_of(table, outcome)))
    return dataclasses.replace(outcome, conformal=fit_conformal(label, _recalibrated(table, outcome)))


def _recalibrated(table: pa.Table, outcome: Outcome) -> Floats:
    return np.asarray(outcome.recalibrate(torch.tensor(probabilities_of(table, outcome))).numpy(), np.float64)


def _join_epoch(options: TrainOptions, epoch: int, outcome: Outcome, times: Times | None) -> pa.Table | None:
    """Return what all folds predict after an epoch, the mean over deals; None where a fold has not come so far."""
    deals: dict[int, list[pa.Table]] = {}
    for member in fold_members(options):
        path = _predictions_file(members_folder(options) / member.name, epoch, outcome)
        if not path.exists():
            return None
        deals.setdefault(member.repeat, []).append(pq.read_table(path))
    tables = [sort_samples(pa.concat_tables(parts)) for parts in deals.values()]
    prediction = np.mean([probabilities_of(table, outcome) for table in tables], axis=0)
    first = tables[0]
    when = None if times is None else first["prediction_time"].to_pylist()
    return make_table(outcome, first["patient_id"].to_pylist(), when, labels_of(first, outcome), prediction, times)


def _pooled_loss(tables: Sequence[pa.Table], outcomes: tuple[Outcome, ...], loss: LossOptions) -> float:
    """Return the mean loss of recalibrated predictions, of several tasks weighted as in training: cross-entropy of
    classes, of a regression half the squared error in units of the labels' standard deviation.
    """
    total = 0.0
    for task, (outcome, table) in enumerate(zip(outcomes, tables, strict=True)):
        label, prediction = labels_of(table, outcome), _recalibrated(table, outcome)
        known = is_labelled(label)
        label, prediction = label[known], prediction[known]
        if not len(label):
            continue
        if outcome.kind == "regression":
            own = 0.5 * np.mean(((prediction[:, 0] - label) / outcome.std) ** 2)
        else:
            own = -np.mean(np.log(prediction[np.arange(len(label)), label.astype(np.int64)] + SMALLEST_PROBABILITY))
        total += loss.weight_of(task) * float(own)
    return total


def finish_cross_fit(options: TrainOptions, data: DataSet, world: World, found: OutOfFold | None) -> int:
    """Join the final models to ``checkpoints/best.pt``, evaluate it on the test split, and write summary and report.

    ``found`` is what the models of folds say; None = there are none, and so no recalibration.
    """
    directory, outcomes = Path(options.run.output_dir), data.outcomes if found is None else found.outcomes
    members = [*fold_members(options), *final_members(options)]
    world.wait()  # the first rank has yet to write the last summary
    runs = [json.loads((members_folder(options) / each.name / "summary.json").read_bytes()) for each in members]
    steps = sum(run["steps"] for run in runs)
    if is_summary_of(directory / "summary.json", steps):
        log_main(world, f"{directory}: cross-fitting is finished; nothing to do, its summary.json has the result")
        return 0
    path = directory / "checkpoints" / "best.pt"
    decided = found.summarize() if found is not None and world.is_main else None  # the bootstrap takes seconds
    joined = _join_members(options, data, outcomes, decided)
    if world.is_main:
        joined.save(path)
        for outcome, table in zip(outcomes, found.tables if found else [], strict=bool(found)):
            write_predictions(predictions_file(directory, "out_of_fold", outcome, outcomes), table)
    test = None
    if data.manifest.splits.get("test"):
        model = joined.build_model(path, data.manifest.vocabulary_fingerprint).to(world.device)
        test = Evaluator(options, data, world).evaluate_split(model, "test").flatten()
    if not world.is_main:
        return 0
    summary = {
        "steps": steps,
        "seconds": round(sum(run["seconds"] for run in runs), 2),
        "models": len(runs),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "out_of_fold": decided,
        "test": test,
    }
    config = SeqSetVAEConfig.from_dict(joined.config)
    for name, card in write_model_cards(config, options, data.num_samples, summary, data.unit):
        write_atomically(directory / name, card.encode())
    write_atomically(directory / "config.yaml", yaml.safe_dump(to_dict(options), sort_keys=False).encode())
    write_summary(directory, summary)
    for name, quality in (("out of fold", decided), ("test", test)):
        if quality is not None:
            print(f"{name} {format_quality(quality)}")
    print(f"report {write_run_report(directory)}")
    return 0


def _join_members(
    options: TrainOptions, data: DataSet, outcomes: tuple[Outcome, ...], decided: dict[str, Any] | None
) -> Checkpoint:
    """Return the final models as one checkpoint, whose outcomes have the recalibration."""
    files = [members_folder(options) / each.name / "checkpoints" / "last.pt" for each in final_members(options)]
    saved = [Checkpoint.load(file) for file in files]
    return Checkpoint(
        config={**saved[0].config, "outcomes": tuple(dataclasses.asdict(outcome) for outcome in outcomes)},
        vocabulary_fingerprint=data.manifest.vocabulary_fingerprint,
        options=to_dict(options),
        state={
            "members": [each.state["ema_model"] for each in saved],
            "progress": {"step": sum(each.step for each in saved)},
        },
        metrics=decided,
    )
