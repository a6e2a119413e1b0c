"""Runs on the samples of a task: what they predict, what is said of samples without events, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task, remove_task
from tests.data_dirs import Patient, add_task, make_patients, write_data_dir
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
