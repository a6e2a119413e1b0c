"""Summaries of variables, by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.loading.batch import PatientBatch
from training.summaries import MAX_VARIABLES, PART, WHOLE, Summaries


def vocabulary_of(*variables: str, counts: list[int] | None = None) -> pa.Table:
    names = ["<padding>", "<unknown>", *variables]
    number = len(names)
    counts = [9, 9, *(counts or [1] * len(variables))]
    return pa.table({"variable": names, "count": counts, "mean": [1.0] * number, "std": [2.0] * number})


def batch_of(
    code: list[int], raw: list[float], hours: list[float], has_value: list[bool] | None = None
) -> PatientBatch:
    """One patient, each event a set of its own; values are scaled as the vocabulary says."""
    number = len(code)
    return PatientBatch(
        code=torch.tensor(code),
        value=(torch.tensor(raw, dtype=torch.float32) - 1) / 2,
        has_value=torch.tensor(has_value or [True] * number),
        set_offsets=torch.arange(number + 1),
        minute=torch.tensor(hours, dtype=torch.float32) * 60,
        patient_offsets=torch.tensor([0, number]),
        label=torch.tensor([1]),
        patient_id=["a"],
    )


def test_by_hand() -> None:
    """GCS is 15 at hour 0, 9 at 12 and 3 at 42; the heart rate is recorded once, at hour 30, and noted at 50."""
    summaries = Summaries(vocabulary_of("GCS", "HR", "SysABP"))
    batch = batch_of([2, 2, 3, 2, 3], [15, 9, 80, 3, 1], [0, 12, 30, 42, 50], [True, True, True, True, False])
    found = dict(zip(summaries.names, summaries.of_batch(batch)[0], strict=True))
    whole = [found[f"GCS, {what}"] for what in ("mean", "least", "greatest", "first", "last", "count")]
    assert whole == pytest.approx([9, 3, 15, 15, 3, 3])
    assert (found["GCS, since first"], found["GCS, since last"], found["HR, since last"]) == pytest.approx((42, 0, 12))
    assert found["GCS, recent"] == pytest.approx((15 * 2**-7 + 9 * 2**-5 + 3) / (2**-7 + 2**-5 + 1))
    assert [found[f"GCS, last 12 h, {what}"] for what in PART] == pytest.approx([3, 3, 3, 3, 1])
    assert [found[f"GCS, first 24 h, {what}"] for what in PART] == pytest.approx([12, 9, 15, 9, 2])
    assert found["HR, slope"] == 0
    assert np.isnan([found[f"SysABP, {what}"] for what in WHOLE if what != "count"]).all()
    assert found["SysABP, count"] == 0
    assert np.isnan(found["HR / SysABP"])
    assert np.isnan(found["PaO2 / FiO2"])
    assert found["change of GCS"] == pytest.approx(-12)
    assert found["events"] == 4


def test_a_ratio_by_hand() -> None:
    summaries = Summaries(vocabulary_of("SysABP", "HR"))
    found = dict(zip(summaries.names, summaries.of_batch(batch_of([3, 2], [90, 120], [0, 1]))[0], strict=True))
    assert found["HR / SysABP"] == pytest.approx(0.75)


def test_of_many_variables_the_most_frequent_are_summarised() -> None:
    number = MAX_VARIABLES + 3
    summaries = Summaries(vocabulary_of(*(f"v{i}" for i in range(number)), counts=[1, 1, 1, *range(5, 5 + number - 3)]))
    variables = {name.split(",")[0] for name in summaries.names if name.startswith("v")}
    assert variables == {f"v{i}" for i in range(3, number)}
    rows = summaries.of_batch(batch_of([2, 2 + number - 1], [5, 7], [0, 1]))
    found = dict(zip(summaries.names, rows[0], strict=True))
    assert (found[f"v{number - 1}, mean"], found["events"]) == pytest.approx((7, 2))
