"""The commands of ``integrations/meds_dev`` run as they stand, on a small MEDS data set, to predictions of splits."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from threading import Thread

import numpy as np
import polars as pl
import pytest
import yaml

import pipeline.tasks
import preprocess
from tests.processes import ROOT, Command
from tests.training.runs import run_shortly
from tests.training.test_meds_predictions import evaluate_as_meds

MODEL = ROOT / "integrations" / "meds_dev" / "model.yaml"
PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "seqsetvae-preprocess": preprocess.main, "seqsetvae-train": run_shortly, "seqsetvae-tasks": pipeline.tasks.main
}  # fmt: skip
START = datetime(2150, 1, 1)
SAMPLE = ["subject_id", "prediction_time", "boolean_value"]
SPLITS = {"train": 24, "tuning": 8, "held_out": 8}


@pytest.fixture
def meds(tmp_path: Path) -> Path:
    """40 subjects with five events each, and two samples, one of them before all events; held_out has one class."""
    rng, names = np.random.default_rng(0), [name for name, count in SPLITS.items() for _ in range(count)]
    subjects = range(1, len(names) + 1)
    events = [
        (subject, START + timedelta(hours=hour), "HR", float(rng.normal() + 2 * (subject % 2)))
        for subject in subjects
        for hour in range(5)
    ]
    labels = [
        (subject, START + timedelta(hours=hour), subject % 2 == 1 and name != "held_out")
        for subject, name in zip(subjects, names, strict=True)
        for hour in (-1, 3)
    ]
    for path, rows, schema in (
        (
            "data/0",
            events,
            {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32},
        ),
        (
            "metadata/subject_splits",
            list(zip(subjects, names, strict=True)),
            {"subject_id": pl.Int64, "split": pl.String},
        ),
        ("task/0", labels, {"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "boolean_value": pl.Boolean}),
    ):
        target = tmp_path / "meds" / f"{path}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows, schema, orient="row").write_parquet(target)
    return tmp_path / "meds"


CALL = """#!/bin/sh
{{ echo {name}; printf '%s\\n' "$@"; }} > "{folder}/called"
read code < "{folder}/ended"
exit "$code"
"""


@pytest.fixture
def errors(tmp_path: Path) -> Iterator[list[str]]:
    """The programs that an installation makes, run by this process for whoever calls them; what they said of errors."""
    folder, errors = tmp_path / "bin", list[str]()
    folder.mkdir()
    called, ended = folder / "called", folder / "ended"
    for pipe in (called, ended):
        os.mkfifo(pipe)
    for name in PROGRAMS:
        (folder / name).write_text(CALL.format(name=name, folder=folder))
        (folder / name).chmod(0o755)

    def serve() -> None:
        while words := called.read_text().splitlines():
            command = Command(PROGRAMS[words[0]], *words[1:])
            errors.append(command.communicate()[1])
            ended.write_text(f"{command.returncode}\n")

    server = Thread(target=serve)
    server.start()
    try:
        yield errors
    finally:
        called.write_text("")
        server.join()


def test_the_three_commands_end_in_predictions_of_every_split(meds: Path, errors: list[str], tmp_path: Path) -> None:
    commands = yaml.safe_load(MODEL.read_text())["commands"]
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def execute(kind: str, stage: str, output: Path, **others: object) -> None:
        folders = {"dataset_dir": meds, "labels_dir": meds / "task", "output_dir": output, "split": "", **others}
        script = "set -e\n" + commands[kind][stage].format(**{"model_initialization_dir": "", **folders})
        done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stderr, errors)

    pretrained, trained = tmp_path / "unsupervised" / "train", tmp_path / "supervised" / "train"
    execute("unsupervised", "train", pretrained)
    execute("supervised", "train", trained, model_initialization_dir=pretrained)
    for split, count in SPLITS.items():
        output = tmp_path / "supervised" / "predict" / split
        execute("supervised", "predict", output, model_initialization_dir=trained, split=split)
        predictions = pl.read_parquet(output / "predictions.parquet")
        assert predictions.height == 2 * count
        assert predictions.null_count().sum_horizontal().item() == 0
        assert predictions["predicted_boolean_probability"].is_between(0, 1).all()
        assert predictions.columns == [*SAMPLE, "predicted_boolean_value", "predicted_boolean_probability"]
        assert predictions["boolean_value"].any() == (split != "held_out")
        found = evaluate_as_meds(output / "predictions.parquet", output / "evaluation.json")
        assert math.isnan(found["roc_auc_score"]) == (split == "held_out")  # which has one class
    assert not (pretrained / "data" / "tasks").exists(), "pretraining is left as it was"
