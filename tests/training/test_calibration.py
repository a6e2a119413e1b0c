"""Recalibration: found again where it was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from model.config import Outcome
from training.calibration import fit_calibration


def test_slope_and_intercept_are_those_of_logistic_regression_on_the_logit() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 2, 3000)
    label = (rng.random(3000) < 1 / (1 + np.exp(-(0.6 * logit + 0.5)))).astype(float)
    p = 1 / (1 + np.exp(-logit))
    slope, zero, intercept = fit_calibration(label, np.column_stack([1 - p, p]))
    expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], label)
    assert zero == 0
    assert slope == pytest.approx(expected.coef_[0, 0], abs=1e-4)
    assert intercept == pytest.approx(expected.intercept_[0], abs=1e-4)


def test_several_classes_by_hand() -> None:
    """Half of those of whom 0.9 is said are of the class: the probabilities become the shares."""
    probability = np.array([[0.8, 0.1, 0.1]] * 4)
    calibration = fit_calibration(np.array([0.0, 0.0, 1.0, 2.0]), probability)
    outcome = Outcome(kind="multiclass", classes=("a", "b", "c"), calibration=calibration)
    answer = outcome.predict(torch.tensor(probability).log()[:, None].float())
    assert answer.numpy() == pytest.approx(np.array([[0.5, 0.25, 0.25]] * 4), abs=1e-3)


def test_unlabelled_samples_do_not_count_and_one_class_changes_nothing() -> None:
    probability = np.array([[0.7, 0.3], [0.4, 0.6], [0.1, 0.9]])
    assert fit_calibration(np.array([0.0, 0.0, np.nan]), probability) == (1.0, 0.0, 0.0)
    assert fit_calibration(np.array([np.nan] * 3), probability) == (1.0, 0.0, 0.0)


def test_what_is_separable_stays_bounded() -> None:
    probability = np.array([[0.6, 0.4], [0.4, 0.6]])
    calibration = fit_calibration(np.array([0.0, 1.0]), probability)
    assert max(map(abs, calibration)) <= 10
    answer = Outcome(calibration=calibration).predict(torch.tensor(probability).log()[:, None].float())
    assert answer[1, 1] > 0.95


def test_no_change_is_no_change() -> None:
    logits = torch.randn(5, 8, 2)
    plain, same = Outcome().predict(logits), Outcome(calibration=(1.0, 0.0, 0.0)).predict(logits)
    assert torch.allclose(plain, same, atol=1e-6)
