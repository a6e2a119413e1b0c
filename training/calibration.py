"""Recalibration: the logistic map of probabilities that makes labels likeliest (Cox 1958)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax

from model.config import SMALLEST_PROBABILITY
from pipeline.arrays import is_labelled

BOUND = 10.0
"""Bound of the slope and of the intercepts: of few or separable predictions they would go on for ever."""

Floats = npt.NDArray[np.float64]


def fit_calibration(label_P: Floats, probability_PC: Floats) -> tuple[float, ...]:
    """Return the slope and the intercepts [C] with which labelled predictions are likeliest; the first intercept is 0.

    See :meth:`model.config.Outcome.predict`.  Without labels of two classes it changes nothing: slope 1, intercepts 0.

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

    bounds = [(0.0, BOUND)] + [(-BOUND, BOUND)] * (num_classes - 1)
    slope, *intercepts = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", tol=1e-12).x.tolist()
    return (slope, 0.0, *intercepts)
