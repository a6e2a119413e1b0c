"""What predictions of a binary outcome are good for: net benefit and alerts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

THRESHOLDS = tuple(number / 100 for number in range(5, 45, 5))
"""Probabilities from which one would act; each says how many false alarms a found patient is worth."""

RECALLS = (0.5, 0.8, 0.9)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def measure_decisions(label_P: Ints, probability_P: Floats) -> dict[str, Any]:
    """Return what acting on predictions brings; empty where labels are of one class.

    Returns:
        ``net_benefit`` at each of ``THRESHOLDS`` t: found patients minus t / (1 − t) times the false alarms, a patient
        (Vickers & Elkin 2006), beside ``treat_all``, which alarms for everyone; treating nobody has 0.
        ``alerts`` at each of ``RECALLS``: the highest ``threshold`` at which that share of the positive patients is
        found, the ``alerts_per_100`` patients, and the ``precision`` of alerts.
    """
    if not 0 < label_P.sum() < len(label_P):
        return {}
    curve, prevalence = {}, label_P.mean()
    for threshold in THRESHOLDS:
        alarm, price = probability_P >= threshold, threshold / (1 - threshold)
        net = (label_P[alarm].sum() - price * (1 - label_P[alarm]).sum()) / len(label_P)
        curve[f"{threshold:g}"] = {"model": float(net), "treat_all": float(prevalence - price * (1 - prevalence))}
    alerts, positive = {}, np.sort(probability_P[label_P == 1])[::-1]
    for recall in RECALLS:
        threshold = positive[int(np.ceil(recall * len(positive))) - 1]
        alarm = probability_P >= threshold
        share = {"threshold": float(threshold), "alerts_per_100": float(100 * alarm.mean())}
        alerts[f"{recall:g}"] = share | {"precision": float(label_P[alarm].mean())}
    return {"net_benefit": curve, "alerts": alerts}


def measure_first_alerts(label_P: Ints, probability_HP: Floats, hours: Sequence[int]) -> dict[str, Any]:
    """Return when alerts come if one is given as soon as the probability reaches a threshold; empty where labels are of
    one class.

    Args:
        label_P: 0 or 1.
        probability_HP: what is predicted of each patient after each of the hours; of one who left earlier, at the end.
        hours: [H], ascending.

    Returns:
        For each of ``RECALLS`` the highest ``threshold`` at which that share of the positive patients has had an alert
        by the last hour, the ``alerts_per_100`` patients, the ``precision`` of alerts, and the ``hours`` by which a
        quarter, half and three quarters of the positive patients who have one have had it.
    """
    if not 0 < label_P.sum() < len(label_P):
        return {}
    highest_HP, found = np.maximum.accumulate(probability_HP), {}
    positive = np.sort(highest_HP[-1][label_P == 1])[::-1]
    for recall in RECALLS:
        threshold = positive[int(np.ceil(recall * len(positive))) - 1]
        is_alerted_HP = highest_HP >= threshold
        alarm = is_alerted_HP[-1]
        hour = np.asarray(hours)[is_alerted_HP[:, alarm & (label_P == 1)].argmax(0)]
        found[f"{recall:g}"] = {
            "threshold": float(threshold),
            "alerts_per_100": float(100 * alarm.mean()),
            "precision": float(label_P[alarm].mean()),
            "hours": np.quantile(hour, [0.25, 0.5, 0.75], method="inverted_cdf").tolist(),
        }
    return found
