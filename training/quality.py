"""How good predicted probabilities are, and how sure that is: scikit-learn's metrics and the bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import config_context
from sklearn.metrics import auc, roc_curve

from pipeline.schema import UNLABELLED

CALIBRATION_BINS = 15
"""Bins of equal mass; patients of one probability share a bin, so there may be fewer."""

METRICS = ("auroc", "auprc", "min_se_ppv", "brier", "ece", "prevalence")

NUM_RESAMPLES = 1000

SMALLEST_WEIGHT = 1e-12
"""Stands for a total weight of 0, of which nothing is a share."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def evaluate_predictions(
    label: Labels, probability: npt.NDArray[np.floating[Any]], *, seed: int = 0
) -> dict[str, float | int | None]:
    """Return metrics of binary predictions, each with a 95 % percentile interval of the bootstrap over patients.

    Args:
        label: [P] int64, 0 or 1; -1 where a patient is unlabelled: left out, and counted.
        probability: [P], of label 1.
        seed: of the resamples, of which there are ``NUM_RESAMPLES``.

    Returns:
        ``num_labelled``, ``num_unlabelled``, ``num_positive``, and for each of the following the value under its
        name and its interval under ``…_low`` and ``…_high``: ``auroc``; ``auprc`` (average precision: no
        interpolation); ``min_se_ppv``, the largest min(sensitivity, positive predictive value) of any threshold
        (score 1 of the PhysioNet Challenge 2012); ``brier``; ``ece``, the mean absolute difference of predicted and
        observed rate over ``CALIBRATION_BINS`` bins of equal mass (of the whole sample, in resamples too, where it is
        biased upwards); ``prevalence``.  What is undefined is None: all of them without labelled patients, those
        that rank where there is one class only.  A resample of one class is left out of an interval.

    Raises:
        ValueError: a probability is not in [0, 1], or a label is not -1, 0 or 1.
    """
    if not np.isin(label, (UNLABELLED, 0, 1)).all():
        raise ValueError(f"labels are 0, 1 or {UNLABELLED} (unlabelled), not {np.setdiff1d(label, (UNLABELLED, 0, 1))}")
    labelled = label != UNLABELLED
    label_P, probability_P = label[labelled], _checked(probability[labelled])
    evaluation: dict[str, float | int | None] = {
        "num_labelled": len(label_P),
        "num_unlabelled": int((~labelled).sum()),
        "num_positive": int(label_P.sum()),
    }
    metrics = _metrics_of(label_P, probability_P)
    values = metrics(np.ones(len(label_P)))
    intervals = _bootstrap(metrics, len(label_P), seed)
    for name, value in values.items():
        low, high = intervals[name] if value is not None else (None, None)
        evaluation |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return evaluation


def rank_predictions(label: Labels, probability: npt.NDArray[np.floating[Any]]) -> tuple[float | None, float | None]:
    """Return AUROC and AUPRC alone, for every validation; arguments and None as in :func:`evaluate_predictions`."""
    labelled = label != UNLABELLED
    label_P, probability_P = label[labelled], _checked(probability[labelled])
    values = _metrics_of(label_P, probability_P)(np.ones(len(label_P)))
    return values["auroc"], values["auprc"]


def _checked(probability_P: npt.NDArray[np.floating[Any]]) -> Floats:
    if not ((probability_P >= 0) & (probability_P <= 1)).all():
        raise ValueError("a probability is not in [0, 1]; NaN means that the model diverged")
    return probability_P.astype(np.float64)


def _metrics_of(label_P: Labels, probability_P: Floats) -> Callable[[Floats], dict[str, float | None]]:
    """Return a function from weights [P] of patients to all metrics; None = undefined."""
    edges = np.quantile(probability_P, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]) if len(label_P) else np.zeros(0)
    bin_P = np.searchsorted(edges, probability_P)

    def metrics(weight_P: Floats) -> dict[str, float | None]:
        values: dict[str, float | None] = dict.fromkeys(METRICS)
        total, positive = weight_P.sum(), weight_P @ label_P
        if 0 < positive < total:
            false_rate, recall, _ = roc_curve(label_P, probability_P, sample_weight=weight_P, drop_intermediate=False)
            true, false = recall * positive, false_rate * (total - positive)
            precision = true[1:] / np.maximum(true + false, SMALLEST_WEIGHT)[1:]
            values["auroc"] = float(auc(false_rate, recall))
            values["auprc"] = float(np.diff(recall) @ precision)
            values["min_se_ppv"] = float(np.minimum(precision, recall[1:]).max())
        if total:
            gap = np.bincount(bin_P, weight_P * (probability_P - label_P))
            values["brier"] = float(weight_P @ (probability_P - label_P) ** 2 / total)
            values["ece"] = float(np.abs(gap).sum() / total)
            values["prevalence"] = float(positive / total)
        return values

    return metrics


def _bootstrap(
    metrics: Callable[[Floats], dict[str, float | None]], num_patients: int, seed: int
) -> dict[str, tuple[float | None, float | None]]:
    """Return the 2.5 % and the 97.5 % percentile of each metric over resamples of the patients."""
    if num_patients == 0:
        return dict.fromkeys(METRICS, (None, None))
    rng, drawn = np.random.default_rng(seed), []
    with config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time
        for _ in range(NUM_RESAMPLES):
            count = np.bincount(rng.integers(num_patients, size=num_patients), minlength=num_patients)
            drawn.append(metrics(count.astype(np.float64)))
    intervals: dict[str, tuple[float | None, float | None]] = {}
    for name in drawn[0]:
        values = np.array([resample[name] for resample in drawn if resample[name] is not None], np.float64)
        low, high = np.percentile(values, [2.5, 97.5]).tolist() if len(values) else (None, None)
        intervals[name] = (low, high)
    return intervals
