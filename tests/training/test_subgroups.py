"""Quality by subgroup: who is in which group, and the metrics of each."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.config import Outcome
from pipeline.loading.batch import PatientBatch
from pipeline.schema import UserError
from training.quality import evaluate_predictions
from training.subgroups import Grouping, evaluate_subgroups, group_patients

VOCABULARY = pa.table(
    {
        "variable": ["", "", "Age", "Sex=F", "Sex=M", "HR"],
        "mean": [0.0, 0.0, 60.0, 0.0, 0.0, 80.0],
        "std": [1.0, 1.0, 10.0, 1.0, 1.0, 20.0],
    }
)


def batch_of(*patients: list[tuple[int, float | None]]) -> PatientBatch:
    """Patients of one set each, of (code, value)."""
    events = [event for patient in patients for event in patient]
    sizes = torch.tensor([len(patient) for patient in patients])
    return PatientBatch(
        code=torch.tensor([code for code, _ in events]),
        value=torch.tensor([value or 0.0 for _, value in events]),
        has_value=torch.tensor([value is not None for _, value in events]),
        set_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        minute=torch.zeros(len(patients)),
        patient_offsets=torch.arange(len(patients) + 1),
        label=torch.zeros(len(patients), dtype=torch.int64),
        patient_id=[f"p{number}" for number in range(len(patients))],
    )


def test_groups_by_value_range_and_category() -> None:
    batch = batch_of([(2, -1.0), (3, None), (2, 5.0)], [(2, 1.0), (4, None)], [(5, 0.0)], [(2, 0.5)])
    groups = group_patients([batch], [Grouping("Age", (60.0, 70.0)), Grouping("Sex")], VOCABULARY)
    assert groups["Age"] == {"p0": "below 60", "p1": "from 70", "p3": "60 to 70"}
    assert groups["Sex"] == {"p0": "F", "p1": "M"}
    assert group_patients([batch], [Grouping("Age")], VOCABULARY)["Age"] == {"p0": "50", "p1": "70", "p3": "65"}


def test_many_values_become_ranges_of_equal_mass() -> None:
    batch = batch_of(*([(2, number / 10)] for number in range(40)))
    groups = group_patients([batch], [Grouping("Age")], VOCABULARY)["Age"]
    assert sorted(np.unique([*groups.values()], return_counts=True)[1].tolist()) == [10] * 4


def test_metrics_are_those_of_the_patients_of_the_group() -> None:
    rng = np.random.default_rng(0)
    label, probability = rng.integers(-1, 2, 40), rng.random(40)
    ids = [f"p{number}" for number in range(40)]
    groups = {"Sex": {who: "F" if number % 2 else "M" for number, who in enumerate(ids) if number < 30}}
    with mock.patch("training.quality.NUM_RESAMPLES", 5):
        found = evaluate_subgroups(groups, ids, label, probability, Outcome())["Sex"]
        alone = evaluate_predictions(label[1:30:2], probability[1:30:2], patient_id=ids[1:30:2])
    assert found.keys() == {"F", "M", "not recorded"}
    own = label[1:30:2]
    expected = (own == 1).sum() / probability[1:30:2][own >= 0].sum()
    assert found["F"].pop("observed_over_expected") == pytest.approx(expected)
    assert found["F"] == alone


def test_what_is_no_variable_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--subgroups Weight: the data have no such variable"):
        group_patients([batch_of([(2, 1.0)])], [Grouping("Weight")], VOCABULARY)
    for text in ("", "Age=80,40", "Age=old", "=3"):
        with pytest.raises(ValueError, match=r"float|name a variable"):
            Grouping.parse(text)
    assert Grouping.parse("Age=40,65") == Grouping("Age", (40.0, 65.0))
