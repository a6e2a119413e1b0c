"""How good predicted probabilities are, and how sure that is: scikit-learn's metrics and the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
Metrics = dict[str, float | None]


class Ranks(NamedTuple):
    """How well probabilities rank patients; None where there are not both classes."""

    auroc: float | None
    auprc: float | None


def evaluate_predictions(
    label: Labels,
    probability: npt.NDArray[np.floating[Any]],
    *,
    patient_id: Sequence[str] | None = None,
    seed: int = 0,
) -> Metrics:
    """Return metrics of binary predictions, each with a 95 % percentile interval of the bootstrap over patients.

    Args:
        label: [P] int64, 0 or 1; -1 where a sample is unlabelled: left out, and counted.
        probability: [P], of label 1.
        patient_id: P ids; samples of one patient are drawn together.  None = each is of another patient.
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
    label_P, probability_P = _select_labelled(label, probability)
    evaluation: Metrics = {"num_labelled": len(label_P), "num_unlabelled": len(label) - len(label_P)}
    evaluation["num_positive"] = int(label_P.sum())
    metrics = _metrics_of(label_P, probability_P)
    patient_P = np.arange(len(label_P))
    if patient_id is not None:
        patient_P = np.unique(np.array(patient_id, object)[label != UNLABELLED].astype(str), return_inverse=True)[1]
    resamples = _bootstrap(metrics, patient_P, seed)
    for name, value in metrics(np.ones(len(label_P))).items():
        drawn = np.array([resample[name] for resample in resamples if resample[name] is not None], np.float64)
        known = value is not None and len(drawn)
        low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if known else (None, None)
        evaluation |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return evaluation


def rank_predictions(label: Labels, probability: npt.NDArray[np.floating[Any]]) -> Ranks:
    """Return AUROC and AUPRC alone, for every validation; arguments as in :func:`evaluate_predictions`."""
    label_P, probability_P = _select_labelled(label, probability)
    values = _metrics_of(label_P, probability_P)(np.ones(len(label_P)))
    return Ranks(values["auroc"], values["auprc"])


def _select_labelled(label: Labels, probability: npt.NDArray[np.floating[Any]]) -> tuple[Labels, Floats]:
    labelled = label != UNLABELLED
    probability_P = probability[labelled].astype(np.float64)
    if not ((probability_P >= 0) & (probability_P <= 1)).all():
        raise ValueError("a probability is not in [0, 1]; NaN means that the model diverged")
    return label[labelled], probability_P


def _metrics_of(label_P: Labels, probability_P: Floats) -> Callable[[Floats], Metrics]:
    """Return a function from weights [P] of patients to all metrics; None = undefined."""
    edges = np.quantile(probability_P, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]) if len(label_P) else np.zeros(0)
    bin_P = np.searchsorted(edges, probability_P)

    def metrics(weight_P: Floats) -> Metrics:
        values: Metrics = dict.fromkeys(METRICS)
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


def _bootstrap(metrics: Callable[[Floats], Metrics], patient_P: Labels, seed: int) -> list[Metrics]:
    """Return the metrics of each resample of the patients, who are numbered from 0; none without patients."""
    rng, num_patients = np.random.default_rng(seed), int(patient_P.max(initial=-1)) + 1
    with config_context(assume_finite=True, skip_parameter_validation=True):  # a third of the time
        draws = (rng.integers(num_patients, size=num_patients) for _ in range(NUM_RESAMPLES if num_patients else 0))
        times = (np.bincount(drawn, minlength=num_patients).astype(np.float64) for drawn in draws)
        return [metrics(weight[patient_P]) for weight in times]
