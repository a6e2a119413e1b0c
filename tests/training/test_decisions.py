"""Net benefit and alerts, by hand and by a loop."""

from __future__ import annotations

import numpy as np
import pytest

from training.decisions import RECALLS, THRESHOLDS, measure_decisions, measure_first_alerts


def test_by_hand() -> None:
    """At 0.2 three are alarmed for, two of them rightly: (2 - 0.25 · 1) / 5."""
    found = measure_decisions(np.array([1, 0, 1, 0, 1]), np.array([0.9, 0.3, 0.2, 0.1, 0.05]))
    assert found["net_benefit"]["0.2"] == pytest.approx({"model": (2 - 0.25) / 5, "treat_all": 0.6 - 0.25 * 0.4})
    assert found["alerts"]["0.5"] == pytest.approx({"threshold": 0.2, "alerts_per_100": 60.0, "precision": 2 / 3})
    assert found["alerts"]["0.9"] == pytest.approx({"threshold": 0.05, "alerts_per_100": 100.0, "precision": 0.6})


def test_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 60)
    probability = rng.integers(0, 11, 60) / 10
    found = measure_decisions(label, probability)
    for threshold in THRESHOLDS:
        net = sum(
            (1 if y else -threshold / (1 - threshold))
            for y, p in zip(label, probability, strict=True)
            if p >= threshold
        )
        assert found["net_benefit"][f"{threshold:g}"]["model"] == pytest.approx(net / 60)
    for recall in RECALLS:
        thresholds = [t for t in probability if label[probability >= t].sum() >= recall * label.sum()]
        assert found["alerts"][f"{recall:g}"]["threshold"] == max(thresholds)


def test_without_two_classes_there_is_nothing_to_decide() -> None:
    assert measure_decisions(np.zeros(3, np.int64), np.full(3, 0.5)) == {}
    assert measure_decisions(np.zeros(0, np.int64), np.zeros(0)) == {}
    assert measure_first_alerts(np.ones(2, np.int64), np.full((3, 2), 0.5), (6, 12, 24)) == {}


def test_first_alerts_by_hand() -> None:
    """Of four positive patients one has 0.9 at once, one 0.6 from 12 hours, one 0.4 for a while, one never more than
    0.1; of two others one has 0.6 at 6 hours, and less later.  An alert that was given stays given.
    """
    label = np.array([1, 1, 1, 1, 0, 0])
    probability = np.array(
        [[0.9, 0.1, 0.0, 0.1, 0.6, 0.0], [0.1, 0.6, 0.4, 0.1, 0.1, 0.1], [0.1, 0.6, 0.1, 0.1, 0.1, 0.1]]
    )
    found = measure_first_alerts(label, probability, (6, 12, 24))
    half = {"threshold": 0.6, "alerts_per_100": 50.0, "precision": pytest.approx(2 / 3), "hours": [6, 6, 12]}
    assert found["0.5"] == half
    assert found["0.8"]["threshold"] == 0.1
    assert found["0.8"]["hours"] == [6, 6, 6]
