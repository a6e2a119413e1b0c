"""How good predictions are, and how sure that is: metrics and the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.config import SMALLEST_PROBABILITY, Outcome
from pipeline.arrays import is_labelled
from training.calibration import calibration_of

CALIBRATION_BINS = 15
"""Bins of equal mass; patients of one probability share a bin, so there may be fewer."""

METRICS = {
    "binary": (
        "auroc", "auprc", "min_se_ppv", "brier", "log_loss", "ece", "calibration_slope", "calibration_intercept",
        "prevalence",
    ),
    "multiclass": ("auroc", "auprc", "accuracy", "brier", "ece"),
    "regression": ("r2", "mae", "rmse", "c_index"),
}  # fmt: skip
"""The metrics of each kind of outcome."""

HEADLINES = {"binary": ("auroc", "auprc"), "multiclass": ("auroc", "auprc"), "regression": ("r2", "mae")}
"""The metrics of every validation."""

NUM_RESAMPLES = 1000

SMALLEST_WEIGHT = 1e-12
"""Stands for a total weight of 0, of which nothing is a share."""

BINARY = Outcome()

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Metrics = dict[str, Any]


def evaluate_predictions(
    label: npt.NDArray[Any],
    prediction: npt.NDArray[np.floating[Any]],
    outcome: Outcome = BINARY,
    *,
    patient_id: Sequence[str] | None = None,
    seed: int = 0,
) -> Metrics:
    """Return the metrics of predictions, each with a 95 % percentile interval of the bootstrap over patients.

    What is undefined is None: all without labelled patients, those that rank where there is one class only.  A resample
    in which a metric is undefined is left out of its interval.

    Args:
        label: [P], -1 (integers) or NaN (floats) where a sample is unlabelled: left out, and counted.
        prediction: [P] probability of label 1, [P, C] probabilities of classes, or [P] the number that is predicted.
        outcome: what was predicted.
        patient_id: P ids; samples of one patient are drawn together.  None = each is of another patient.
        seed: of the resamples, of which there are ``NUM_RESAMPLES``.

    Returns:
        ``num_labelled``, ``num_unlabelled``, of a binary outcome ``num_positive``, of classes ``classes`` with the
        number, AUROC and AUPRC of each against all others; and for each of the following the value under its name and
        its interval under ``…_low`` and ``…_high``.

        Binary: ``auroc``; ``auprc`` (average precision: no interpolation); ``min_se_ppv``, the largest min(sensitivity,
        positive predictive value) of any threshold (score 1 of the PhysioNet Challenge 2012); ``brier``; ``log_loss``;
        ``ece``, the mean absolute difference of predicted and observed rate over bins of equal mass of the whole
        sample; slope and intercept of :func:`training.calibration.calibration_of`; ``prevalence``.

        Classes: means over the classes of ``auroc``, ``auprc`` and ``ece`` of each against all others, where they are
        defined; ``accuracy`` of the likeliest class; ``brier``, the sum over the classes (Brier 1950).

        Regression: ``r2``; ``mae``; ``rmse``; ``c_index``, the share of pairs of different labels that predictions
        order alike, ties counting half (Harrell et al. 1982, without censoring).

    Raises:
        ValueError: a probability is not in [0, 1], a prediction is not finite, or a label is no class.
    """
    label_P, prediction_P = _select_labelled(label, prediction, outcome)
    evaluation: Metrics = {"num_labelled": len(label_P), "num_unlabelled": len(label) - len(label_P)}
    if outcome.kind == "binary":
        evaluation["num_positive"] = int(label_P.sum())
    if outcome.kind == "multiclass":
        of_class = [(name, label_P == number) for number, name in enumerate(outcome.classes)]
        ranks = [rank_predictions(own.astype(np.int64), prediction_P[:, c]) for c, (_, own) in enumerate(of_class)]
        numbers = ({"num_labelled": int(own.sum())} for _, own in of_class)
        names = (name for name, _ in of_class)
        evaluation["classes"] = {n: number | rank for n, number, rank in zip(names, numbers, ranks, strict=True)}
    metrics = _metrics_of(label_P, prediction_P, outcome)
    patient_P = np.arange(len(label_P))
    if patient_id is not None:
        patient_P = np.unique(np.array(patient_id, object)[is_labelled(label)].astype(str), return_inverse=True)[1]
    resamples = _bootstrap(metrics, patient_P, seed)
    for name, value in metrics(np.ones(len(label_P))).items():
        drawn = np.array([resample[name] for resample in resamples if resample[name] is not None], np.float64)
        known = value is not None and len(drawn)
        low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if known else (None, None)
        evaluation |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return evaluation


def rank_predictions(
    label: npt.NDArray[Any], prediction: npt.NDArray[np.floating[Any]], outcome: Outcome = BINARY
) -> Metrics:
    """Return the ``HEADLINES`` alone, for every validation; arguments as in :func:`evaluate_predictions`."""
    label_P, prediction_P = _select_labelled(label, prediction, outcome)
    values = _metrics_of(label_P, prediction_P, outcome)(np.ones(len(label_P)))
    return {name: values[name] for name in HEADLINES[outcome.kind]}


def _select_labelled(
    label: npt.NDArray[Any], prediction: npt.NDArray[np.floating[Any]], outcome: Outcome
) -> tuple[npt.NDArray[Any], Floats]:
    """Return labels and predictions of the labelled samples, which are checked; labels of classes as integers."""
    labelled = is_labelled(label)
    label_P, prediction_P = label[labelled].astype(np.float64), prediction[labelled].astype(np.float64)
    if outcome.kind == "regression":
        if not np.isfinite(prediction_P).all():
            raise ValueError("a prediction is not finite: the model diverged")
        return label_P, prediction_P
    if not np.isin(label_P, np.arange(len(outcome.classes))).all():
        raise ValueError(
            f"a label is not among the {len(outcome.classes)} classes, and does not say that it is missing"
        )
    if not ((prediction_P >= 0) & (prediction_P <= 1)).all():
        raise ValueError("a probability is not in [0, 1]; NaN means that the model diverged")
    return label_P.astype(np.int64), prediction_P


def _metrics_of(label_P: npt.NDArray[Any], prediction_P: Floats, outcome: Outcome) -> Callable[[Floats], Metrics]:
    """Return a function from weights [P] of patients to all metrics; None = undefined."""
    if outcome.kind == "regression":
        return lambda weight_P: _measure_errors(label_P, prediction_P, weight_P)
    if outcome.kind == "binary":
        return _binary_metrics_of(label_P, prediction_P)
    one_by_one = [_binary_metrics_of((label_P == c).astype(np.int64), p) for c, p in enumerate(prediction_P.T)]
    is_right_P = prediction_P.argmax(1) == label_P

    def metrics(weight_P: Floats) -> Metrics:
        values: Metrics = dict.fromkeys(METRICS["multiclass"])
        if not (total := weight_P.sum()):
            return values
        of_class = [measure(weight_P) for measure in one_by_one]
        for name in ("auroc", "auprc", "ece"):
            known = [each[name] for each in of_class if each[name] is not None]
            values[name] = float(np.mean(known)) if known else None
        values["brier"] = sum(each["brier"] for each in of_class)
        values["accuracy"] = float(weight_P @ is_right_P / total)
        return values

    return metrics


def _binary_metrics_of(label_P: Ints, probability_P: Floats) -> Callable[[Floats], Metrics]:
    edges = np.quantile(probability_P, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]) if len(label_P) else np.zeros(0)
    bin_P = np.searchsorted(edges, probability_P)
    of_label_P = np.where(label_P == 1, probability_P, 1 - probability_P)
    loss_P = -np.log(of_label_P.clip(SMALLEST_PROBABILITY))
    calibration = calibration_of(label_P.astype(np.float64), probability_P)
    above = _count_above(label_P, probability_P)

    def metrics(weight_P: Floats) -> Metrics:
        values: Metrics = dict.fromkeys(METRICS["binary"])
        total, positive = weight_P.sum(), weight_P @ label_P
        if 0 < positive < total:
            values |= _rank_metrics(*above(weight_P))
        if total:
            gap = np.bincount(bin_P, weight_P * (probability_P - label_P))
            values["brier"] = float(weight_P @ (probability_P - label_P) ** 2 / total)
            values["ece"] = float(np.abs(gap).sum() / total)
            values["log_loss"] = float(weight_P @ loss_P / total)
            values["prevalence"] = float(positive / total)
            slope, intercept = calibration(weight_P)
            values |= {"calibration_slope": slope, "calibration_intercept": intercept}
        return values

    return metrics


def _count_above(label_P: Ints, probability_P: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
    """Return a function from weights [P] to two rows, of the label 1 and of the label 0: the weight of the patients
    whose prediction is at or above each threshold, thresholds falling.

    Patients are sorted once for all resamples; scikit-learn's metrics, which sort them in each, take ten times as long.
    """
    order_P = np.argsort(-probability_P, kind="stable")
    is_last = np.append(np.diff(probability_P[order_P]) != 0, True)[: len(order_P)]
    label_P = label_P[order_P]

    def above(weight_P: Floats) -> tuple[Floats, Floats]:
        weight_P = weight_P[order_P]
        true_P = np.cumsum(weight_P * label_P)
        return true_P[is_last], (np.cumsum(weight_P) - true_P)[is_last]

    return above


def _rank_metrics(true_T: Floats, false_T: Floats) -> Metrics:
    """Return the metrics that rank, from the weights at or above each of T thresholds; the last are those of all."""
    recall_T = true_T / true_T[-1]
    precision_T = true_T / np.maximum(true_T + false_T, SMALLEST_WEIGHT)
    gained_T, passed_T = np.diff(recall_T, prepend=0.0), np.diff(false_T, prepend=0.0)
    return {
        "auroc": float(passed_T @ (recall_T - gained_T / 2) / false_T[-1]),
        "auprc": float(gained_T @ precision_T),
        "min_se_ppv": float(np.minimum(precision_T, recall_T).max()),
    }


def _measure_errors(label_P: Floats, prediction_P: Floats, weight_P: Floats) -> Metrics:
    """Return the metrics of a regression; ``weight_P`` has whole numbers, of how often a patient was drawn."""
    values: Metrics = dict.fromkeys(METRICS["regression"])
    if not (total := weight_P.sum()):
        return values
    error_P = prediction_P - label_P
    square = float(weight_P @ error_P**2 / total)
    variance = float(weight_P @ (label_P - weight_P @ label_P / total) ** 2 / total)
    values |= {"mae": float(weight_P @ np.abs(error_P) / total), "rmse": square**0.5}
    if variance > 0:
        values["r2"] = 1 - square / variance
        times = weight_P.astype(np.int64)
        values["c_index"] = _concordance(np.repeat(label_P, times), np.repeat(prediction_P, times))
    return values


def _concordance(label_P: Floats, prediction_P: Floats) -> float:
    """Return the share of pairs of different labels that predictions order alike, ties counting half.

    Kendall's tau-b is the difference of the pairs in order and out of order, over the geometric mean of the pairs that
    differ in each; so the difference, and with it the share, follows from it in O(P log P).
    """
    ties = [_count_pairs(np.unique(x, return_counts=True)[1]) for x in (label_P, prediction_P)]
    different = [_count_pairs(np.array([len(label_P)])) - tied for tied in ties]
    if not different[1]:
        return 0.5
    from scipy.stats import kendalltau  # noqa: PLC0415 (half a second that only regressions need)

    tau = float(kendalltau(label_P, prediction_P).statistic)
    return 0.5 + tau * (different[0] * different[1]) ** 0.5 / (2 * different[0])


def _count_pairs(sizes: npt.NDArray[Any]) -> float:
    return float((sizes * (sizes - 1.0)).sum() / 2)


def _bootstrap(metrics: Callable[[Floats], Metrics], patient_P: Ints, seed: int) -> list[Metrics]:
    """Return the metrics of each resample of the patients, who are numbered from 0; none without patients."""
    rng, num_patients = np.random.default_rng(seed), int(patient_P.max(initial=-1)) + 1
    draws = (rng.integers(num_patients, size=num_patients) for _ in range(NUM_RESAMPLES if num_patients else 0))
    times = (np.bincount(drawn, minlength=num_patients).astype(np.float64) for drawn in draws)
    return [metrics(weight[patient_P]) for weight in times]
