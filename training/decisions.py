"""What predictions of a binary outcome are good for: net benefit and alerts."""

from __future__ import annotations

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
