"""Distillation: what the teacher answers, and what the model is trained towards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import training.teacher
from model.losses import LossOptions
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import SampleCounts
from pipeline.loading.samples import BatchSamples
from pipeline.schema import UserError
from tests.model.helpers import random_batch
from tests.training.runs import assert_same, read_metrics, run, weights, write_tiny_data
from training.data import DataOptions, DataSet, agree_on_data
from training.parallel import World
from training.targets import TEACHER_FILE, Teacher
from training.teacher import find_teacher, fit_teacher

ALONE = World(0, 1, torch.device("cpu"))


def remember(x_train: Any, y_train: Any, x_test: Any, **_: object) -> dict[str, Any]:
    """A stack that knows each training sample by heart, and answers 1/4 for others."""
    known = {row.tobytes(): label for row, label in zip(np.nan_to_num(x_train), y_train, strict=True)}
    return {"stack": np.array([known.get(row.tobytes(), 0.25) for row in np.nan_to_num(x_test)])}


@pytest.fixture(autouse=True)
def _nothing_answered() -> None:
    training.teacher._ANSWERS.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "data")


def open_data(data: Path, task: str | None = "default") -> DataSet:
    options = DataOptions(data_dir=str(data))
    return agree_on_data(options, Manifest.load(data), ALONE, task, "train", "valid", "test")


def test_each_labelled_sample_is_answered_for_by_others(data: Path) -> None:
    with mock.patch.object(training.teacher, "fit_stack", remember):
        teacher = fit_teacher(open_data(data), ALONE, weight=0.5)
    with mock.patch.object(training.teacher, "fit_stack", side_effect=AssertionError("it was fitted already")):
        assert fit_teacher(open_data(data), ALONE, weight=0.5) == teacher
    labelled = open_data(data).tasks[0].splits["train"].num_labelled
    assert len(teacher.probability) == labelled > 0
    assert set(teacher.probability.values()) == {0.25}


def test_targets_by_hand() -> None:
    batch = random_batch([[1], [1], [1]])
    batch.label[:] = torch.tensor([1, 0, -1])
    teacher = Teacher(0.4, {"p0": 0.5, "p1": 0.25})
    torch.testing.assert_close(teacher.soften(batch).label, torch.tensor([0.8, 0.1, torch.nan]), equal_nan=True)
    samples = BatchSamples(
        patient=torch.tensor([0, 1, 2]),
        num_sets=torch.tensor([1, 1, 1]),
        label=torch.tensor([0.2, 1.0, torch.nan]),
        prediction_time=[1.0, None, 2.0],
    )
    softened = Teacher(0.5, {"p0@1.0": 0.4, "p1": 0.0}).soften(
        type(batch)(**{**vars(batch), "samples": samples, "label": batch.label})
    )
    torch.testing.assert_close(softened.sample_label, torch.tensor([0.3, 0.5, torch.nan]), equal_nan=True)


def test_a_teacher_is_kept_with_its_run_and_resumed(data: Path, tmp_path: Path) -> None:
    flags = ["--distill", "0.5", "--max_epochs", "2"]
    assert run(data, tmp_path / "whole", *flags) == 0
    assert run(data, tmp_path / "parts", *flags, "--stop_after", "1") == 0
    saved = Teacher.load(tmp_path / "parts" / TEACHER_FILE)
    with mock.patch("training.teacher.fit_teacher", side_effect=AssertionError("a resumed run keeps its teacher")):
        assert run(data, tmp_path / "parts", *flags, "--resume") == 0
    assert Teacher.load(tmp_path / "parts" / TEACHER_FILE) == saved
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert run(data, tmp_path / "plain", "--max_epochs", "2") == 0
    losses = [read_metrics(tmp_path / name)[0]["outcome"] for name in ("whole", "plain")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("labelled", "classes", "expected"),
    [(500, [450, 50], 0.4), (499, [400, 99], 0.0), (600, [551, 49], 0.0), (50_001, [40_000, 10_001], 0.0)],
)
def test_where_nobody_asks_there_is_a_teacher_of_neither_few_nor_many(
    data: Path, labelled: int, classes: list[int], expected: float
) -> None:
    opened = open_data(data)
    counts = SampleCounts(num_labelled=labelled, class_counts=classes)
    task = dataclasses.replace(opened.tasks[0], splits={"train": counts})
    opened = dataclasses.replace(opened, tasks=(task,))
    with mock.patch.object(training.teacher, "fit_teacher", lambda *_, weight, threads: weight):
        assert (find_teacher(opened, ALONE, LossOptions(), None) or 0.0) == expected
        assert find_teacher(opened, ALONE, LossOptions(distill=0), None) is None
        assert find_teacher(opened, ALONE, LossOptions(distill=0.1), None) == 0.1
        assert find_teacher(opened, ALONE, LossOptions(objective="pretrain"), None) is None
        two = dataclasses.replace(opened, tasks=(task, task))
        assert find_teacher(two, ALONE, LossOptions(), None) is None


def test_a_damaged_teacher_is_named(tmp_path: Path) -> None:
    for content in ("", "{}", json.dumps({"weight": 1, "probability": [1]})):
        (tmp_path / TEACHER_FILE).write_text(content)
        with pytest.raises(UserError, match=r"teacher\.json: cannot be read .*start a new --output_dir"):
            Teacher.load(tmp_path / TEACHER_FILE)


def test_what_cannot_be_taught_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is for one binary task"):
        fit_teacher(open_data(data, None), ALONE, weight=0.5)
    monkeypatch.setattr(training.teacher, "TEACHER_FOLDS", 30)
    with pytest.raises(UserError, match="needs at least 30 training patients of each class"):
        fit_teacher(open_data(data), ALONE, weight=0.5)
    monkeypatch.setattr(training.teacher, "MOST_TAUGHT", 3)
    with pytest.raises(UserError, match=r"at most 3 samples, and .* have a label"):
        fit_teacher(open_data(data), ALONE, weight=0.5)
