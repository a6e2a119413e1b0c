"""Recalibration: found again where it was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from model.config import Outcome
from training.calibration import calibration_of, fit_calibration, fit_conformal, measure_conformal


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


def test_measured_slope_and_intercept_are_those_of_weighted_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    logit, weight = rng.normal(-1, 1.5, 400), rng.integers(0, 3, 400).astype(float)
    label = (rng.random(400) < 1 / (1 + np.exp(-(0.7 * logit - 0.4)))).astype(float)
    slope, intercept = calibration_of(label, 1 / (1 + np.exp(-logit)))(weight)
    often = np.repeat(np.arange(400), weight.astype(int))
    expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[often][:, None], label[often])
    assert slope == pytest.approx(expected.coef_[0, 0], abs=1e-4)
    assert intercept is not None
    at_intercept = 1 / (1 + np.exp(-(logit[often] + intercept)))
    assert at_intercept.mean() == pytest.approx(label[often].mean(), abs=1e-8), "as many as are predicted"


@pytest.mark.parametrize(
    ("label", "probability", "is_defined"),
    [
        ([0, 0], [0.2, 0.3], (False, False)),
        ([0, 1], [0.2, 0.3], (False, True)),  # they separate the classes
        ([0, 1], [0.3, 0.3], (False, True)),
        ([0, 1, 0, 1], [0.1, 0.9, 0.9, 0.1], (True, True)),
        ([], [], (False, False)),
    ],
)
def test_calibration_is_undefined_where_it_has_no_end(
    label: list[float], probability: list[float], is_defined: tuple[bool, bool]
) -> None:
    found = calibration_of(np.array(label, float), np.array(probability))(np.ones(len(label)))
    assert tuple(each is not None for each in found) == is_defined


def test_conformal_sets_by_hand() -> None:
    """Of nine of a class the lowest is the threshold at a rate of 0.1; of eight, none can be missed."""
    p = np.array([*np.arange(1, 10) / 10, *np.arange(1, 9) / 10])
    label = np.array([1.0] * 9 + [0.0] * 8)
    fitted = {rate: least for rate, *least in fit_conformal(label, np.column_stack([1 - p, p]))}
    assert fitted[0.1] == pytest.approx([0.0, 0.1])
    assert fitted[0.2] == pytest.approx([0.2, 0.2])
    found = measure_conformal(
        np.array([1.0, 1.0, 0.0, np.nan]), np.array([[0.95, 0.05], [0.5, 0.5], [0.9, 0.1], [0, 1]]),
        ((0.1, 0.6, 0.2),), ("no", "yes"),
    )["0.1"]  # fmt: skip
    assert found["coverage"] == {"no": 1.0, "yes": 0.5}
    assert found["sets"] == pytest.approx({"empty": 0.0, "of_one": 1.0, "of_more": 0.0})


@given(st.integers(0, 200), st.sampled_from([0.3, 0.7]))
def test_conformal_sets_cover_each_class_of_new_samples(seed: int, prevalence: float) -> None:
    """On the average over many draws; of one draw the coverage is a beta variable about it."""
    rng = np.random.default_rng(seed)

    def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
        label = (rng.random(number) < prevalence).astype(float)
        p = 1 / (1 + np.exp(-(2 * label - 1 + rng.normal(size=number))))
        return label, np.column_stack([1 - p, p])

    found = measure_conformal(*draw(4000), fit_conformal(*draw(4000)), ("0", "1"))
    for rate, each in found.items():
        for coverage in each["coverage"].values():
            assert coverage > 1 - float(rate) - 0.08
