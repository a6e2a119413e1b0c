"""Calibration: how predicted probabilities lie beside observed rates, and the maps that mend them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_softmax

from model.config import SMALLEST_PROBABILITY
from pipeline.arrays import is_labelled

BOUND = 10.0
"""Bound of the slope and of the intercepts: of few or separable predictions they would go on for ever."""

LEAST_SLOPE = 0.05
"""Of predictions that say nothing the likeliest slope is 0, or negative; this one keeps their order."""

MISS_RATES = (0.05, 0.1, 0.2)
"""Shares of each class that conformal sets may miss."""

NEWTON_STEPS, NEWTON_TOLERANCE, SINGULAR = 25, 1e-6, 1e-12

Floats = npt.NDArray[np.float64]


def calibration_of(label_P: Floats, probability_P: Floats) -> Callable[[Floats], tuple[float | None, float | None]]:
    """Return a function from weights [P] to slope and intercept of the calibration of predictions of a binary outcome.

    The slope is that of a logistic regression of the label on the logit of the prediction: 1 is perfect, less says that
    predictions are too extreme.  The intercept is fitted with a slope of 1 ("in the large"): 0 is perfect, less says
    that they are too high (Cox 1958; Van Calster et al. 2019).  None = undefined: all labels are of one class, or
    predictions separate the classes, or are all alike.
    """
    p = probability_P.clip(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    logit = np.log(p) - np.log1p(-p)
    started = _fit_line(logit, label_P, np.ones(len(p)), (1.0, 0.0)), _fit_shift(logit, label_P, np.ones(len(p)), 0.0)
    line_start, shift_start = started[0] or (1.0, 0.0), started[1] or 0.0  # a resample's fit is near that of all

    def measure(weight_P: Floats) -> tuple[float | None, float | None]:
        if not 0 < weight_P @ label_P < weight_P.sum():
            return None, None
        line = _fit_line(logit, label_P, weight_P, line_start)
        return line[0] if line else None, _fit_shift(logit, label_P, weight_P, shift_start)

    return measure


def _fit_line(x_P: Floats, label_P: Floats, weight_P: Floats, start: tuple[float, float]) -> tuple[float, float] | None:
    """Return slope and intercept of a weighted logistic regression, by Newton's method; None where it has no end."""
    slope, intercept = start
    for _ in range(NEWTON_STEPS):
        p = expit(slope * x_P + intercept)
        error, information = weight_P * (label_P - p), weight_P * p * (1 - p)
        moment = information * x_P
        s0, s1, s2 = information.sum(), moment.sum(), moment @ x_P
        determinant = s0 * s2 - s1 * s1
        if not determinant > SINGULAR * s0 * s2:
            return None
        g0, g1 = error.sum(), error @ x_P
        steps = (s0 * g1 - s1 * g0) / determinant, (s2 * g0 - s1 * g1) / determinant
        slope, intercept = slope + _short(steps[0]), intercept + _short(steps[1])
        if max(map(abs, steps)) < NEWTON_TOLERANCE:
            return float(slope), float(intercept)
    return None


def _fit_shift(offset_P: Floats, label_P: Floats, weight_P: Floats, start: float) -> float | None:
    """Return the intercept at which as many are predicted as there are; None where there is none."""
    shift = start
    for _ in range(NEWTON_STEPS):
        p = expit(offset_P + shift)
        information = weight_P @ (p * (1 - p))
        if not information > 0:
            return None
        step = weight_P @ (label_P - p) / information
        shift += _short(step)
        if abs(step) < NEWTON_TOLERANCE:
            return float(shift)
    return None


def _short(step: float) -> float:
    return max(-1.0, min(1.0, step))  # far from the end a step of Newton's is too long


def fit_conformal(label_P: Floats, probability_PC: Floats) -> tuple[tuple[float, ...], ...]:
    """Return for each of ``MISS_RATES`` the rate, and then the least probability [C] of a class in a conformal set.

    A set of classes misses each class in at most that share of its samples, whatever the model, if new samples are like
    these (class-conditional conformal prediction: Vovk 2012, arXiv:1209.2673).  0 = the class is in every set, for too
    few of it are labelled to say more.

    Args:
        label_P: number of the class, NaN = unlabelled.
        probability_PC: what was predicted of samples that the model never saw.
    """
    rows = []
    for rate in MISS_RATES:
        least = []
        for number in range(probability_PC.shape[1]):
            own = np.sort(probability_PC[label_P == number, number])
            missed = int(np.floor(rate * (len(own) + 1)))  # one more than may be missed of the lowest
            least.append(float(own[missed - 1]) if missed else 0.0)
        rows.append((rate, *least))
    return tuple(rows)


def measure_conformal(
    label_P: Floats, probability_PC: Floats, fitted: tuple[tuple[float, ...], ...], classes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Return, by the rate of misses, the share of each class's samples whose set has it, and the shares of sets with no
    class, one, and more.
    """
    known, found = is_labelled(label_P), {}
    label_P, probability_PC = label_P[known].astype(np.int64), probability_PC[known]
    for rate, *least in fitted:
        is_in_PC = probability_PC >= least
        size_P, covered_P = is_in_PC.sum(1), is_in_PC[np.arange(len(label_P)), label_P]
        coverage = {name: covered_P[label_P == c] for c, name in enumerate(classes)}
        found[f"{rate:g}"] = {
            "coverage": {name: float(own.mean()) if len(own) else None for name, own in coverage.items()},
            "sets": {
                name: float(own.mean()) if len(own) else None
                for name, own in (("empty", size_P == 0), ("of_one", size_P == 1), ("of_more", size_P > 1))
            },
        }
    return found


def fit_calibration(label_P: Floats, probability_PC: Floats) -> tuple[float, ...]:
    """Return the slope and the intercepts [C] with which labelled predictions are likeliest; the first intercept is 0.

    See :meth:`model.config.Outcome.recalibrate`.  Without labels of two classes it changes nothing: slope 1, intercepts
    0.

    Args:
        label_P: number of the class, NaN = unlabelled.
        probability_PC: probabilities of the classes.
    """
    known, num_classes = is_labelled(label_P), probability_PC.shape[1]
    label_P, log_PC = label_P[known].astype(np.int64), np.log(probability_PC[known] + SMALLEST_PROBABILITY)
    start = np.array([1.0, *np.zeros(num_classes - 1)])
    counts = np.bincount(label_P, minlength=num_classes)
    if (counts > 0).sum() < 2:
        return (1.0, *np.zeros(num_classes).tolist())
    one_hot_PC = np.eye(num_classes)[label_P]

    def loss(fitted: Floats) -> tuple[float, Floats]:
        score_PC = fitted[0] * log_PC + np.concatenate([[0.0], fitted[1:]])
        log_found_PC = log_softmax(score_PC, axis=1)
        gap_PC = (np.exp(log_found_PC) - one_hot_PC) / len(label_P)
        gradient = np.concatenate([[(gap_PC * log_PC).sum()], gap_PC.sum(0)[1:]])
        return float(-(one_hot_PC * log_found_PC).sum() / len(label_P)), gradient

    from scipy.optimize import minimize  # noqa: PLC0415 (half a second that only cross-fitting needs)

    bounds = [(LEAST_SLOPE, BOUND)] + [(-BOUND, BOUND)] * (num_classes - 1)
    slope, *intercepts = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-12).x.tolist()
    return (slope, 0.0, *intercepts)
