"""Trackers by their own libraries; each is skipped where its library is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import read_metrics, run, write_tiny_data
from tests.training.test_resume import Killed, killed_in

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def run_twice(data: Path, out: Path, name: str) -> dict[int, float]:
    """Stop a run in its second epoch and resume it; return the training losses of its log by step."""
    flags = ["--track", name, "--checkpoint_steps", "2"]
    with killed_in("train_step", after=7), pytest.raises(Killed):
        run(data, out, *flags, report=True)
    assert run(data, out, *flags, "--resume", report=True) == 0
    return {line["step"]: line["loss"] for line in read_metrics(out) if line["kind"] == "train"}


def test_tensorboard(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = run_twice(data, tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    shown = {event.step: event.value for event in found.Scalars("train/loss")}
    assert shown == pytest.approx(losses)
    assert "test/auroc" in found.Tags()["scalars"]


def test_wandb(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_twice(data, tmp_path, "wandb")
    identity = (tmp_path / "run_id").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert runs, "offline by default"
    assert all(list(each.glob("*.wandb")) for each in runs)


def test_mlflow(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    losses = run_twice(data, tmp_path, "mlflow")
    client: Any = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("seqsetvae")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["run.seed"] == "0"
    shown = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    assert shown == pytest.approx(losses)
    assert [artifact.path for artifact in client.list_artifacts(found.info.run_id)] == ["report.html"]
    assert json.loads((tmp_path / "summary.json").read_text())["test"]["auroc"] == pytest.approx(
        found.data.metrics["test/auroc"]
    )
