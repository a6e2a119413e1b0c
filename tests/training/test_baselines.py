"""Summaries by hand, and what is said where nothing can be fitted."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from model.config import Outcome
from pipeline.loading.batch import PatientBatch
from tests.model.helpers import NUM_CODES, random_batch
from training.baselines import SUMMARIES, fit_baselines, summaries


def test_summaries_by_hand() -> None:
    """Code 2 has 1, 5 and 3 over two sets and one event without a number; the second patient is unlabelled."""
    batch = PatientBatch(
        code=torch.tensor([2, 2, 3, 2, 2, 4]),
        value=torch.tensor([1.0, 5, 7, 3, 0, 9]),
        has_value=torch.tensor([True, True, True, True, False, True]),
        set_offsets=torch.tensor([0, 3, 5, 6]),
        minute=torch.tensor([0.0, 10, 0]),
        patient_offsets=torch.tensor([0, 2, 3]),
        label=torch.tensor([1, -1]),
        patient_id=["a", "b"],
    )
    x, y, patient_id = summaries([batch], 5, [Outcome()])
    assert y.tolist() == [[1]]
    assert patient_id == ["a"]
    assert x.shape == (1, 5 * SUMMARIES)
    row = x.reshape(5, SUMMARIES)
    assert row[2].tolist() == [3, 1, 5, 1, 3, 3]
    assert row[3].tolist() == [7, 7, 7, 7, 7, 1]
    assert np.isnan(row[[0, 1, 4]]).all()


def test_what_the_summaries_say_is_found() -> None:
    """The outcome is whether the variables' values are high."""
    sets = [[3, 2]] * 60
    batch = random_batch(sets)
    shift = torch.repeat_interleave(batch.label * 6.0, batch.events_per_patient)
    told = dataclasses.replace(batch, value=batch.value + shift)
    (found,) = fit_baselines([told], [told], NUM_CODES, (Outcome(),))
    for metrics in found.values():
        assert metrics is not None
        assert metrics["auroc"] > 0.95


def test_one_outcome_alone_fits_nothing() -> None:
    batch = random_batch([[2], [3]], labels=[1, 1])
    nothing = [{"trees": None, "logistic_regression": None}]
    assert fit_baselines([batch], [batch], NUM_CODES, (Outcome(),)) == nothing
    assert fit_baselines([], [], NUM_CODES, (Outcome(),)) == nothing


def test_numbers_and_classes_have_models_of_their_own() -> None:
    """Values of class c are shifted by 6 c, the number is 10 c, and class d occurs in no sample."""
    batch = random_batch([[3, 2]] * 60)
    classes = torch.arange(60) % 3
    told = dataclasses.replace(
        batch, value=batch.value + torch.repeat_interleave(classes * 6.0, batch.events_per_patient)
    )
    outcomes = (
        Outcome(name="class", kind="multiclass", classes=("a", "b", "c", "d")),
        Outcome(name="number", kind="regression", classes=()),
    )
    told = dataclasses.replace(told, label=torch.stack([classes.float(), 10 * classes.float()], 1))
    of_class, of_number = fit_baselines([told], [told], NUM_CODES, outcomes)
    assert of_class.keys() == {"trees", "logistic_regression"}
    assert of_number.keys() == {"trees", "ridge"}
    trees, regression = of_class["trees"], of_number["trees"]
    assert trees is not None
    assert regression is not None
    assert trees["accuracy"] > 0.9
    assert trees["classes"]["d"] == {"num_labelled": 0, "auroc": None, "auprc": None}
    assert regression["r2"] > 0.7
