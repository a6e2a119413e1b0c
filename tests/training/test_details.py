from __future__ import annotations

import dataclasses

import numpy as np
import torch

from model.config import Outcome
from model.losses import LossOptions
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from tests.model.helpers import first_hours, random_batch, tiny_model
from training.details import ANSWER_HOURS, EARLY_HOURS, Details, evaluate_by_length, judge_answers, reconstruction_sums
from training.parallel import World


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


@torch.no_grad()
def test_answers_are_those_of_the_first_hours_alone() -> None:
    """Gathered in two batches of one pass each; every answer is compared with a pass over the events until then."""
    batches = [random_batch([[3, 1, 2, 4], [2]], seed=4), random_batch([[1, 5, 3]], seed=5)]
    model = tiny_model().eval()
    with Details(model, LossOptions(), None) as details:
        for batch in batches:
            prepared = PreparedBatch.build(batch, prefixes=Prefixes.after_hours(batch, details.hours))
            details.add(prepared, model(prepared))
    rows = np.concatenate(details.answers)
    assert rows[:, 0].tolist() == [10, 2, 9]
    assert rows[:, 1].tolist() == [0, 1, 0]
    for number, hour in enumerate((float("inf"), *details.hours)):
        expected = torch.cat([model(first_hours(batch, hour)).predictions[0] for batch in batches])
        np.testing.assert_allclose(rows[:, 2 + 2 * number : 4 + 2 * number], expected.numpy(), rtol=1e-5)
    found, _ = details.summarize(World(0, 1, torch.device("cpu")))
    assert set(found) == {"reconstruction_error", "reconstruction_error_at_variable_means"}


def test_answers_are_judged_by_task() -> None:
    """A task of two classes that is answered rightly from 12 hours on, and a number without labels."""
    hours, stay = len(ANSWER_HOURS), Outcome(name="stay", kind="regression", classes=())
    rows = np.zeros((2, 3 + 3 * (1 + hours)))
    rows[:, 0], rows[:, 1], rows[:, 2] = 5, [0, 1], np.nan
    views = rows[:, 3:].reshape(2, 1 + hours, 3)
    views[:, :, 1] = [[0.3], [0.6]]
    views[:, 1 : 1 + ANSWER_HOURS.index(12), 1] = [[0.6], [0.3]]
    mortality, of_stay = judge_answers(rows, (Outcome(), stay), ANSWER_HOURS)
    assert [mortality["after_the_first"][f"{hour} hours"]["auroc"] for hour in EARLY_HOURS] == [0, 1, 1, 1]
    assert mortality["first_alerts"]["0.9"] == {
        "threshold": 0.6, "alerts_per_100": 100.0, "precision": 0.5, "hours": [12, 12, 12]
    }  # fmt: skip
    assert "first_alerts" not in of_stay
    assert of_stay["by_length"] == {}
