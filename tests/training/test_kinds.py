"""Runs on tasks of classes and numbers, and on several tasks at once, from labels to cards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import make_loader
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import load_tasks
from pipeline.tasks import main as tasks_main
from tests.training.runs import read_metrics, read_summary, run, weights, write_tiny_data
from training.checkpoint import Checkpoint, load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the task ``default`` the number ``los`` and the classes ``ward``, each unlabelled for some patients."""
    folder = tmp_path_factory.mktemp("data")
    data = write_tiny_data(folder / "data")
    ids = pq.read_table(data / "index.parquet")["patient_id"].to_pylist()
    rows = [
        (name, None if i % 9 == 0 else float(i % 7), None if i % 8 == 0 else "abc"[i % 3]) for i, name in enumerate(ids)
    ]
    pl.DataFrame(rows, ["patient_id", "los", "ward"], orient="row").write_csv(folder / "labels.csv")
    for name, kind in (("los", "regression"), ("ward", "auto")):
        command = ["add", str(data), "--name", name, "--labels", str(folder / "labels.csv"), "--label_column", name]
        assert tasks_main([*command, "--label_kind", kind]) == 0
    return data


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    flags = ["--task", "default,los,ward", "--task_weights", "1", "0.5", "1", "--class_weights", "balanced"]
    assert run(data, folder, *flags, report=True) == 0
    return folder


def test_each_task_has_its_predictions_and_its_card(data: Path, finished: Path) -> None:
    test = read_summary(finished)["test"]
    assert test["tasks"].keys() == {"default", "los", "ward"}
    assert test["mae"] == test["tasks"]["los"]["mae"]
    assert test["tasks"]["ward"]["classes"].keys() == {"a", "b", "c"}
    columns = {
        "default": ["patient_id", "label", "probability"],
        "los": ["patient_id", "label", "prediction"],
        "ward": ["patient_id", "label", "prediction", "probability_a", "probability_b", "probability_c"],
    }
    for name, expected in columns.items():
        table = pq.read_table(finished / f"predictions_test_{name}.parquet")
        assert table.column_names == expected
        assert table.num_rows == 12
        assert f"task {name}" in (finished / f"MODEL_CARD_{name}.md").read_text()
    ward = pq.read_table(finished / "predictions_test_ward.parquet").to_pylist()
    for row in ward:
        of_class = {name: row[f"probability_{name}"] for name in "abc"}
        assert sum(of_class.values()) == pytest.approx(1, abs=1e-6)
        assert row["prediction"] == max(of_class, key=of_class.__getitem__)
    labels = pq.read_table(data / "tasks" / "los.parquet").to_pylist()
    given = {row["patient_id"]: row["label"] for row in labels}
    los = pq.read_table(finished / "predictions_test_los.parquet").to_pylist()
    assert [row["label"] for row in los] == [given[row["patient_id"]] for row in los]
    assert None in {row["label"] for row in los}
    page = (finished / "report.html").read_text()
    assert "Predictions: test_los" in page


def test_the_log_has_the_loss_of_each_task(finished: Path) -> None:
    for line in read_metrics(finished):
        losses = [line[f"outcome_{name}"] for name in ("default", "los", "ward")]
        assert line["outcome"] == pytest.approx(losses[0] + 0.5 * losses[1] + losses[2], rel=1e-5)


def test_a_checkpoint_knows_its_tasks(data: Path, finished: Path, tmp_path: Path) -> None:
    best = finished / "checkpoints" / "best.pt"
    assert run(data, tmp_path, "--evaluate", str(best), "--baselines") == 0
    found = json.loads((tmp_path / "evaluation_test.json").read_text())
    of_tasks = {name: each["baselines"].keys() for name, each in found["tasks"].items()}
    linear = {"default": "logistic_regression", "los": "ridge", "ward": "logistic_regression"}
    assert of_tasks == {name: {"trees", other} for name, other in linear.items()}
    for name, table in ((name, f"predictions_test_{name}.parquet") for name in linear):
        mine, theirs = pq.read_table(tmp_path / table), pq.read_table(finished / table)
        assert mine["label"] == theirs["label"], name
    loader = make_loader(data, split="test", task="los", batch_size=12)
    model = load_model(best, loader.manifest.vocabulary_fingerprint)
    batch = next(iter(loader))
    with torch.no_grad():
        predictions = model(batch).predictions
    assert [tuple(prediction.shape) for prediction in predictions] == [(12, 2), (12, 1), (12, 3)]
    los = pq.read_table(finished / "predictions_test_los.parquet")
    expected = dict(zip(los["patient_id"].to_pylist(), los["prediction"].to_pylist(), strict=True))
    assert predictions[1][:, 0].tolist() == pytest.approx([expected[name] for name in batch.patient_id], abs=1e-4)


def test_a_run_of_several_tasks_goes_on_as_if_it_had_not_stopped(data: Path, finished: Path, tmp_path: Path) -> None:
    flags = ["--task", "default,los,ward", "--task_weights", "1", "0.5", "1", "--class_weights", "balanced"]
    assert run(data, tmp_path, *flags, "--max_epochs", "1") == 0
    changed = Checkpoint.load(tmp_path / "checkpoints" / "last.pt").options["optimisation"]
    assert changed["max_epochs"] == 1
    assert run(data, tmp_path, *flags, "--max_epochs", "2", "--resume") == 0
    assert weights(tmp_path).keys() == weights(finished).keys()


def test_what_was_learned_of_one_task_begins_another(data: Path, finished: Path, tmp_path: Path) -> None:
    best = finished / "checkpoints" / "best.pt"
    assert run(data, tmp_path, "--task", "los", "--init_from", str(best), "--max_epochs", "1") == 0
    summary = read_summary(tmp_path)
    assert math.isfinite(summary["test"]["mae"])
    assert {"r2", "mae", "rmse", "c_index"} <= summary["test"].keys()
    assert (tmp_path / "predictions_test.parquet").exists()
    assert "MAE and RMSE are in the units of the labels" in (tmp_path / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "default,los", "--task_weights", "1"], "--task_weights: 1 weights for 2 tasks"),
        (["--task", "default,los", "--task_weights", "1", "-1"], "--task_weights must be at least 0"),
        (["--task", "los", "--pos_weight", "2"], "--pos_weight is for binary tasks"),
        (
            ["--task", "los", "--monitor", "auroc"],
            "--monitor auroc: the task has no such metric; choose one of r2",
        ),
        (["--task", "ward", "--meds_predictions"], "--meds_predictions: MEDS has a schema for one binary task"),
        (["--task", "ward,ward"], "names a task twice"),
    ],
)
def test_flags_that_do_not_fit_the_tasks_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(data, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_asked_for_other_classes(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(finished / "checkpoints" / "best.pt")
    assert run(data, tmp_path, "--evaluate", best, "--task", "los") == 2
    assert "--task los: of other classes than" in capsys.readouterr().err


def test_soft_labels_are_learned_and_measured_as_classes(data: Path, tmp_path: Path) -> None:
    ids = pq.read_table(data / "index.parquet")["patient_id"].to_pylist()
    labels = tmp_path / "labels.csv"
    rows = [(name, [0.0, 0.3, 0.5, 1.0, None][i % 5]) for i, name in enumerate(ids)]
    pl.DataFrame(rows, ["patient_id", "label"], orient="row").write_csv(labels)
    command = ["add", str(data), "--name", "soft", "--labels", str(labels), "--label_kind", "binary"]
    assert tasks_main(command) == 0
    (counts,) = (task.splits["test"] for task in load_tasks(data, Manifest.load(data), "soft"))
    batch = next(iter(make_loader(data, split="test", task="soft", batch_size=12, shuffle=False)))
    given = batch.label.double().nan_to_num(nan=-1).tolist()
    assert sorted(set(given)) == pytest.approx([-1.0, 0.0, 0.3, 0.5, 1.0])
    assert run(data, tmp_path / "run", "--task", "soft", "--folds", "2", "--final_seeds", "1", report=True) == 0
    table = pq.read_table(tmp_path / "run" / "predictions_test.parquet")
    found = dict(zip(table["patient_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert found == {
        name: None if label < 0 else int(label >= 0.5) for name, label in zip(batch.patient_id, given, strict=True)
    }
    positive = sum(label or 0 for label in found.values())
    assert counts.class_counts == [counts.num_labelled - positive, positive]
    assert read_summary(tmp_path / "run")["test"]["log_loss"] > 0
