"""Runs on the samples of a task: what they predict, what is said of samples without events, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from model.losses import LossCounts, LossOptions, compute_losses
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from pipeline import make_loader
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task, remove_task
from tests.data_dirs import Patient, add_task, make_patients, write_data_dir
from tests.model.helpers import tiny_model
from tests.training.runs import run


def with_task(folder: Path) -> Path:
    """A data set whose task ``early`` has a sample before each patient's second set, and one before all events."""
    splits: dict[str, list[Patient]] = {
        name: make_patients([[1 + (i + k) % 4 for k in range(2 + i % 3)] for i in range(count)], seed=seed, prefix=name)
        for seed, (name, count) in enumerate({"train": 16, "valid": 8, "test": 8}.items())
    }
    data = write_data_dir(folder, splits)
    samples = [
        (patient, minute, number % 2)
        for patients in splits.values()
        for number, patient in enumerate(patients)
        for minute in (patient.sets[1][0] - 0.5, -1e6 + number)
    ]
    samples += [(splits["train"][0], 1e6 + number, 1) for number in range(8)]
    add_task(data, samples, "early")
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_task(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run(data, folder, "--task", "early", "--batch_size", "4") == 0
    return folder


def test_there_is_a_prediction_a_sample_and_the_prevalence_where_there_is_no_event(finished: Path, data: Path) -> None:
    task = Task.load(data, Manifest.load(data), "early")
    counts = task.splits["train"]
    assert task.prior()[1] == counts.class_counts[1] / counts.num_labelled == (16 + 8) / (32 + 8)
    predictions = pq.read_table(finished / "predictions_test.parquet")
    assert predictions.column_names == ["patient_id", "prediction_time", "label", "probability"]
    assert predictions.num_rows == task.splits["test"].num_samples == 16
    rows = predictions.to_pylist()
    keys = [(row["patient_id"], row["prediction_time"]) for row in rows]
    assert keys == sorted(keys)
    without = [row["probability"] for row in rows if row["prediction_time"] < -1e5]
    assert without == [task.prior()[1]] * 8
    assert not {row["probability"] for row in rows if row["prediction_time"] > -1e5} & set(without)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["test"]["num_labelled"] == 16


def test_a_checkpoint_answers_the_same_when_it_is_evaluated_elsewhere(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    best = str(finished / "checkpoints" / "best.pt")
    assert run(data, tmp_path, "--evaluate", best, "--task", "early", "--baselines") == 0
    mine, theirs = (pq.read_table(folder / "predictions_test.parquet") for folder in (tmp_path, finished))
    assert mine.drop_columns("probability") == theirs.drop_columns("probability")
    assert mine["probability"].to_pylist() == pytest.approx(theirs["probability"].to_pylist(), abs=1e-6)


def test_a_run_goes_on_with_its_task_alone(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", "early", "--batch_size", "4"]
    assert run(data, tmp_path / "parts", *flags, "--max_epochs", "1") == 0
    assert run(data, tmp_path / "parts", "--batch_size", "4", "--resume") == 2
    refused = "--task None cannot be combined with a run saved with --task early"
    assert refused in capsys.readouterr().err
    assert run(data, tmp_path / "parts", *flags, "--max_epochs", "2", "--resume") == 0


def test_an_outcome_needs_a_task_and_pretraining_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = with_task(tmp_path / "data")
    remove_task(data, "default")
    assert run(data, tmp_path / "run") == 2
    assert "has no task 'default'; add it with python -m pipeline.tasks add" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(data, tmp_path / "run", "--objective", "pretrain", "--max_epochs", "1") == 0
    predictions = pq.read_table(tmp_path / "run" / "predictions_test.parquet")
    assert predictions.column_names == ["patient_id", "label", "probability"]
    assert predictions.num_rows == predictions["label"].null_count == predictions["probability"].null_count == 8
    best = str(tmp_path / "run" / "checkpoints" / "best.pt")
    assert run(data, tmp_path / "tuned", "--task", "early", "--init_from", best, "--max_epochs", "1") == 0


@pytest.fixture(scope="module")
def hourly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose task has a sample after each set of a patient."""
    splits = {
        name: make_patients([[1 + (i + k) % 3 for k in range(2 + i % 4)] for i in range(count)], seed=seed, prefix=name)
        for seed, (name, count) in enumerate({"train": 12, "valid": 6, "test": 8}.items())
    }
    data = write_data_dir(tmp_path_factory.mktemp("hourly") / "data", splits)
    patients = [patient for each in splits.values() for patient in each]
    sets = [(patient, at, minute) for patient in patients for at, (minute, _) in enumerate(patient.sets)]
    add_task(data, [(patient, minute, at % 2) for patient, at, minute in sets], "hourly")
    return data


def test_samples_that_share_windows_are_predicted_alike(hourly: Path, tmp_path: Path) -> None:
    flags = ["--task", "hourly", "--share_windows", "--batch_size", "4"]
    assert run(hourly, tmp_path / "run", *flags) == 0
    assert run(hourly, tmp_path / "again", *flags, "--devices", "2", "--max_epochs", "2") == 0
    best = str(tmp_path / "run" / "checkpoints" / "best.pt")
    assert run(hourly, tmp_path / "alone", "--evaluate", best, "--task", "hourly", "--batch_size", "5") == 0
    found = [pq.read_table(tmp_path / name / "predictions_test.parquet") for name in ("run", "again", "alone")]
    names = ["patient_id", "prediction_time", "label"]
    assert found[0].select(names) == found[1].select(names) == found[2].select(names)
    probability = [table["probability"].to_pylist() for table in found]
    assert probability[2] == pytest.approx(probability[0], abs=1e-5)
    assert probability[1] == pytest.approx(probability[0], abs=1e-3)


def test_answers_after_hours_are_not_asked_beside_those_of_samples(
    hourly: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hourly, tmp_path, "--task", "hourly", "--share_windows", "--prefix_weight", "1") == 2
    assert "leave --prefix_weight" in capsys.readouterr().err


def test_a_step_of_shared_windows_is_a_step_of_separate_ones(hourly: Path) -> None:
    """Without noise, and learning outcomes alone, the gradient is that of the same samples as patients."""
    loader = make_loader(hourly, task="hourly", batch_size=99, share_windows=True, shuffle=False)
    shared = next(iter(loader))
    assert shared.samples is not None
    prefixes = Prefixes(shared.samples.patient, shared.samples.num_sets)
    alone = replace(prefixes.separate(shared), label=shared.samples.label)
    model, options = tiny_model(num_codes=loader.manifest.num_codes).eval(), LossOptions(objective="supervised")
    gradients = []
    for prepared in (PreparedBatch.build(shared), PreparedBatch.build(alone)):
        model.zero_grad()
        output, counts = model(prepared, reconstruct=False), LossCounts.one(1)
        compute_losses(output, prepared.batch.sample_label, options, counts, beta=0.0).total.backward()
        gradients.append([torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
