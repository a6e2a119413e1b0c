"""How good the predicted probabilities are, and how sure that is.

Every metric is a sum over patients, each with a weight: weight 1 gives the metric itself, how often a bootstrap
resample drew the patient gives the metric of that resample.  So one function serves both, for hundreds of
resamples at a time, and sorts the patients only once.

Shape suffixes: P labelled patients, R resamples, G groups of patients with one probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.schema import UNLABELLED

CALIBRATION_BINS = 15
"""Bins of equal mass; patients of one probability share a bin, so there may be fewer."""

NUM_RESAMPLES = 1000
_RESAMPLED_CELLS = 1 << 20  # R·P weights at a time: tens of MiB, whatever the number of patients

Floats = npt.NDArray[np.float64]
Metrics = Callable[[Floats], dict[str, Floats]]


def evaluate_predictions(
    label: npt.NDArray[np.int64], probability: npt.NDArray[np.floating[Any]], *, seed: int = 0
) -> dict[str, float | int | None]:
    """Metrics of binary predictions, each with a 95 % percentile interval of the bootstrap over patients.

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
    labelled_P = label != UNLABELLED
    label_P, probability_P = label[labelled_P], probability[labelled_P].astype(np.float64)
    evaluation: dict[str, float | int | None] = {
        "num_labelled": len(label_P),
        "num_unlabelled": int((~labelled_P).sum()),
        "num_positive": int(label_P.sum()),
    }
    ranking, calibration = _ranking_metrics(label_P, probability_P), _calibration_metrics(label_P, probability_P)

    def metrics(weight_RP: Floats) -> dict[str, Floats]:
        return ranking(weight_RP) | calibration(weight_RP)

    resampled = _bootstrap(metrics, len(label_P), seed)
    for name, (value,) in metrics(np.ones((1, len(label_P)))).items():
        defined = bool(np.isfinite(value))
        low, high = np.nanpercentile(resampled[name], [2.5, 97.5]) if defined else (np.nan, np.nan)
        for key, number in ((name, value), (f"{name}_low", low), (f"{name}_high", high)):
            evaluation[key] = float(number) if defined else None
    return evaluation


def auroc_auprc(
    label: npt.NDArray[np.int64], probability: npt.NDArray[np.floating[Any]]
) -> tuple[float | None, float | None]:
    """AUROC and AUPRC alone, for every validation; arguments and None as in :func:`evaluate_predictions`."""
    labelled_P = label != UNLABELLED
    metrics = _ranking_metrics(label[labelled_P], probability[labelled_P].astype(np.float64))
    value = metrics(np.ones((1, int(labelled_P.sum()))))
    auroc, auprc = float(value["auroc"][0]), float(value["auprc"][0])
    return (auroc, auprc) if np.isfinite(auroc) else (None, None)


def _bootstrap(metrics: Metrics, num_patients: int, seed: int) -> dict[str, Floats]:
    """``metrics`` of ``NUM_RESAMPLES`` resamples of the patients, each [NUM_RESAMPLES]."""
    rng = np.random.default_rng(seed)
    num_at_once = max(1, _RESAMPLED_CELLS // max(1, num_patients))
    parts = []
    for first in range(0, NUM_RESAMPLES, num_at_once):
        num_resamples = min(num_at_once, NUM_RESAMPLES - first)
        drawn_RP = rng.integers(max(1, num_patients), size=(num_resamples, num_patients))
        cell_RP = drawn_RP + num_patients * np.arange(num_resamples)[:, None]
        count = np.bincount(cell_RP.ravel(), minlength=num_resamples * num_patients)
        parts.append(metrics(count.reshape(num_resamples, num_patients).astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _ranking_metrics(label_P: npt.NDArray[np.int64], probability_P: Floats) -> Metrics:
    """What depends on the order of the probabilities only: [R, P] weights to metrics [R]; NaN where one class lacks."""
    if not ((probability_P >= 0) & (probability_P <= 1)).all():
        raise ValueError("a probability is not in [0, 1]; NaN means that the model diverged")
    order_P = np.argsort(-probability_P, kind="stable")
    positive_P = label_P[order_P].astype(np.float64)
    last_G = np.flatnonzero(np.diff(probability_P[order_P], append=np.nan))  # equal probabilities: one threshold

    def metrics(weight_RP: Floats) -> dict[str, Floats]:
        weight_RP = weight_RP[:, order_P]
        positive_RP = weight_RP * positive_P
        true_RG = np.cumsum(positive_RP, axis=1)[:, last_G]
        false_RG = np.cumsum(weight_RP - positive_RP, axis=1)[:, last_G]
        total_true_R, total_false_R = positive_RP.sum(axis=1), (weight_RP - positive_RP).sum(axis=1)
        step_true_RG = np.diff(true_RG, axis=1, prepend=0)
        step_false_RG = np.diff(false_RG, axis=1, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            both_R = np.where((total_true_R > 0) & (total_false_R > 0), 1.0, np.nan)
            # Before the first drawn patient nothing is predicted positive: 0 / 0, and nothing is gained there.
            precision_RG = np.nan_to_num(true_RG / (true_RG + false_RG))
            recall_RG = true_RG / total_true_R[:, None]
            area_R = (step_false_RG * (true_RG - step_true_RG / 2)).sum(axis=1)  # a tie counts one half
            return {
                "auroc": both_R * area_R / (total_true_R * total_false_R),
                "auprc": both_R * (step_true_RG * precision_RG).sum(axis=1) / total_true_R,
                "min_se_ppv": both_R * np.minimum(recall_RG, precision_RG).max(axis=1, initial=0.0),
            }

    return metrics


def _calibration_metrics(label_P: npt.NDArray[np.int64], probability_P: Floats) -> Metrics:
    """What depends on the probabilities' values: [R, P] weights to metrics [R]; NaN without patients."""
    error_P = probability_P - label_P
    edges = np.quantile(probability_P, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]) if len(label_P) else np.zeros(0)
    bin_P = np.searchsorted(edges, probability_P)
    order_P = np.argsort(bin_P, kind="stable")
    starts = np.flatnonzero(np.diff(bin_P[order_P], prepend=-1))

    def metrics(weight_RP: Floats) -> dict[str, Floats]:
        with np.errstate(invalid="ignore"):
            total_R = weight_RP.sum(axis=1)
            gap = np.add.reduceat((weight_RP * error_P)[:, order_P], starts, axis=1) if len(starts) else weight_RP
            return {
                "brier": weight_RP @ error_P**2 / total_R,
                "ece": np.abs(gap).sum(axis=1) / total_R,
                "prevalence": weight_RP @ label_P / total_R,
            }

    return metrics
