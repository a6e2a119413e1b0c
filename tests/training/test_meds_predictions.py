"""Predictions as MEDS has them: a run on a MEDS data set, from its files to a table that its evaluation reads."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

import preprocess
from pipeline.schema import UserError
from tests.training.runs import read_summary, run
from training.meds_predictions import NO_THRESHOLD, choose_threshold, write_meds_predictions

START = datetime(2150, 1, 1)


@pytest.fixture(scope="module")
def meds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 subjects with an event an hour for six hours; their labels are at the third hour."""
    folder = tmp_path_factory.mktemp("meds")
    rng = np.random.default_rng(0)
    subjects, splits = np.arange(1, 61), (["train"] * 36 + ["tuning"] * 12 + ["held_out"] * 12)
    events = [
        (int(subject), START + timedelta(hours=hour), "HR", float(rng.normal() + subject % 2))
        for subject in subjects
        for hour in range(6)
    ]
    schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    for name in ("data", "metadata", "task"):
        (folder / name).mkdir()
    pl.DataFrame(events, schema, orient="row").write_parquet(folder / "data" / "0.parquet")
    pl.DataFrame({"subject_id": subjects, "split": splits}).write_parquet(
        folder / "metadata" / "subject_splits.parquet"
    )
    times = pl.Series([START + timedelta(hours=3)] * 60, dtype=pl.Datetime("us"))
    labels = {"subject_id": subjects, "prediction_time": times, "boolean_value": subjects % 2 == 1}
    pl.DataFrame(labels).write_parquet(folder / "task" / "0.parquet")
    return folder


def evaluate_as_meds(predictions: Path, output: Path) -> dict[str, float]:
    """Return the metrics of samples that the program of ``meds-evaluation`` writes."""
    program = Path(sysconfig.get_path("scripts")) / "meds-evaluation-cli"
    command = [str(program), f"predictions_path={predictions}", f"output_file={output}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(output.read_text())["samples_equally_weighted"])


def prepare(meds: Path, output: Path, *flags: str) -> Path:
    given = [str(meds), "--output", str(output), "--labels", str(meds / "task"), "--workers", "1"]
    assert preprocess.main([*given, *flags]) == 0
    return output


def test_a_run_writes_what_the_evaluation_of_meds_reads(meds: Path, tmp_path: Path) -> None:
    data = prepare(meds, tmp_path / "data")
    assert run(data, tmp_path / "run", "--meds_predictions", "--max_epochs", "1") == 0
    table = pq.read_table(tmp_path / "run" / "predictions_meds" / "test.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "subject_id": "int64",
        "prediction_time": "timestamp[us]",
        "boolean_value": "bool",
        "predicted_boolean_value": "bool",
        "predicted_boolean_probability": "double",
    }
    assert table["subject_id"].to_pylist() == list(range(49, 61))
    assert set(table["prediction_time"].to_pylist()) == {START + timedelta(hours=3)}
    assert table["boolean_value"].to_pylist() == [subject % 2 == 1 for subject in range(49, 61)]
    probability, test = table["predicted_boolean_probability"].to_numpy(), read_summary(tmp_path / "run")["test"]
    assert test["auroc"] == pytest.approx(roc_auc_score(table["boolean_value"].to_numpy(), probability))
    found = evaluate_as_meds(tmp_path / "run" / "predictions_meds" / "test.parquet", tmp_path / "evaluation.json")
    assert found["roc_auc_score"] == pytest.approx(test["auroc"])
    assert found["average_precision_score"] == pytest.approx(test["auprc"])
    assert found["brier_score"] == pytest.approx(test["brier"])
    assert table["predicted_boolean_value"].to_pylist() == (probability >= test["threshold"]).tolist()


def test_pseudonyms_and_tasks_without_times_are_refused_before_anything_is_written(
    meds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    hidden = prepare(meds, tmp_path / "hidden", "--pseudonymize", str(tmp_path / "key"))
    assert run(hidden, tmp_path / "run", "--meds_predictions") == 2
    assert "--meds_predictions: patients are called by pseudonyms" in capsys.readouterr().err
    data = prepare(meds, tmp_path / "data")
    assert run(data, tmp_path / "run", "--meds_predictions", "--objective", "pretrain") == 2
    assert "--meds_predictions: the task has no prediction times" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ids_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    columns = {
        "patient_id": ["a"],
        "prediction_time": pa.array([START], pa.timestamp("us")),
        "label": pa.array([1], pa.int8()),
        "probability": [0.5],
    }
    with pytest.raises(UserError, match="no whole number"):
        write_meds_predictions(tmp_path, "test", pa.table(columns), 0.5)


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 8)), min_size=1, max_size=30))
def test_the_threshold_has_the_best_f1_of_all(samples: list[tuple[int, int]]) -> None:
    label, probability = np.array([y for y, _ in samples]), np.array([p / 8 for _, p in samples])
    threshold = choose_threshold(label, probability)
    label, probability = label[label >= 0], probability[label >= 0]
    if len(set(label.tolist())) < 2:
        assert threshold == NO_THRESHOLD
        return
    scores = [f1_score(label, probability >= cut) for cut in np.unique(probability)]
    assert f1_score(label, probability >= threshold) == pytest.approx(max(scores))
