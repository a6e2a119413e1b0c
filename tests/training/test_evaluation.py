from __future__ import annotations

import dataclasses

import numpy as np
import torch

from model.config import Outcome
from model.prepared import PreparedBatch
from pipeline.loading.batch import PatientBatch
from tests.model.helpers import random_batch, tiny_model
from training.evaluation import evaluate_by_length, first_hours, reconstruction_sums


def test_first_hours_count_from_the_first_set() -> None:
    """Sets at minutes 60, 420 and 421 of one patient, at 0 of another: six hours end with minute 420."""
    batch = PatientBatch(
        code=torch.tensor([2, 3, 4, 5, 6]),
        value=torch.zeros(5),
        has_value=torch.ones(5, dtype=torch.bool),
        set_offsets=torch.tensor([0, 2, 3, 4, 5]),
        minute=torch.tensor([60.0, 420.0, 421.0, 0.0]),
        patient_offsets=torch.tensor([0, 3, 4]),
        label=torch.tensor([0, 1]),
        patient_id=["a", "b"],
    )
    early = first_hours(batch, 6)
    assert early.code.tolist() == [2, 3, 4, 6]
    assert early.minute.tolist() == [60.0, 420.0, 0.0]
    assert early.patient_offsets.tolist() == [0, 2, 3]


def test_buckets_by_hand() -> None:
    """Lengths 1…8 in four buckets of two; the longest are ranked the wrong way, an unlabelled patient is left out."""
    label = np.array([0, 1, 0, 1, 0, 1, 0, 1, -1])
    probability = np.array([0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.5])
    found = evaluate_by_length(label, probability, np.array([1, 2, 3, 4, 5, 6, 7, 8, 100]), Outcome())
    assert list(found) == ["1 to 2 events", "3 to 4 events", "5 to 6 events", "7 to 8 events"]
    assert [bucket["auroc"] for bucket in found.values()] == [1.0, 1.0, 1.0, 0.0]
    assert [(bucket["patients"], bucket["positive"]) for bucket in found.values()] == [(2, 1)] * 4


def test_means_reconstruct_what_lies_at_the_mean() -> None:
    batch = random_batch([[3, 1], [2]])
    model = tiny_model().eval()
    batch = dataclasses.replace(batch, value=batch.value * 0)
    prepared = PreparedBatch.build(batch)
    ours, at_mean = reconstruction_sums(model, prepared, model(prepared)).tolist()
    assert ours > 1e-3
    assert abs(at_mean) < 1e-4


def test_lengths_of_no_labelled_patient() -> None:
    assert evaluate_by_length(np.array([-1, -1]), np.array([0.5, 0.5]), np.array([3, 4]), Outcome()) == {}
