"""Each input as people have it becomes, with ``--format auto``, a data set on which an epoch is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import preprocess
from tests.real_shapes import MAKERS, Sample
from tests.training.runs import read_summary, run

TINY = ("--max_epochs", "1", "--batch_size", "64", "--preset", "small")


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_from_the_input_to_a_trained_epoch(make: Callable[[Path], Sample], tmp_path: Path) -> None:
    (tmp_path / "given" / "in").mkdir(parents=True)
    sample, data = make(tmp_path / "given" / "in"), tmp_path / "data"
    assert preprocess.main([str(sample.path), "--output", str(data), "--workers", "1", *sample.flags]) == 0
    summary = json.loads((data / "summary.json").read_text())
    assert summary["format"] == sample.format
    assert [warning for warning in summary["warnings"] if "label" in warning] == []
    samples = [split["num_labelled"] for split in summary["samples"].values()]
    assert sum(samples) == sample.num_samples
    assert all(samples)
    assert run(data, tmp_path / "run", *TINY) == 0
    trained = read_summary(tmp_path / "run")
    assert trained["steps"] >= 1
    assert trained["test"]["num_labelled"] == summary["samples"]["test"]["num_labelled"]
