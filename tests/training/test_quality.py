from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from model.config import Outcome
from training.quality import CALIBRATION_BINS, evaluate_predictions, rank_predictions

METRICS = ("auroc", "auprc", "min_se_ppv", "brier", "ece", "prevalence")


NUMBER = Outcome(name="los", kind="regression", classes=())
CLASSES = Outcome(name="ward", kind="multiclass", classes=("a", "b", "c"))


def naive_metrics(label: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """The definitions, patient by patient and threshold by threshold."""
    positive, negative = probability[label == 1], probability[label == 0]
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    auprc, best, before = 0.0, 0.0, 0.0
    for threshold in sorted(set(probability.tolist()), reverse=True):
        chosen = label[probability >= threshold]
        precision, recall = chosen.mean(), chosen.sum() / label.sum()
        auprc += (recall - before) * precision
        best, before = max(best, min(precision, recall)), recall
    return {"auroc": float(np.mean(pairs)), "auprc": auprc, "min_se_ppv": best}


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    label = draw(st.lists(st.integers(0, 1), min_size=2, max_size=40).filter(lambda labels: len(set(labels)) == 2))
    # Few distinct values, so that ties within and between the classes are common.
    tenths = draw(st.lists(st.integers(0, 10), min_size=len(label), max_size=len(label)))
    return np.array(label), np.array(tenths) / 10


def test_by_hand() -> None:
    # Descending: 1 0 1 0.  Pairs won: 2 + 1 of 4.  Precision where recall rises: 1/1, 2/3.
    evaluation = evaluate_predictions(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.5, 0.8]))
    assert evaluation["auroc"] == pytest.approx(3 / 4)
    assert evaluation["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert evaluation["min_se_ppv"] == pytest.approx(2 / 3)  # at the third: all positives found, 2 of 3 right
    assert evaluation["brier"] == pytest.approx((0.01 + 0.36 + 0.25 + 0.04) / 4)
    assert evaluation["ece"] == pytest.approx((0.1 + 0.6 + 0.5 + 0.2) / 4)  # a bin each
    assert evaluation["prevalence"] == 0.5


@given(predictions())
def test_agrees_with_naive_and_library(given_predictions: tuple[np.ndarray, np.ndarray]) -> None:
    label, probability = given_predictions
    with mock.patch("training.quality.NUM_RESAMPLES", 2):  # intervals have tests of their own
        evaluation = evaluate_predictions(label, probability)
    expected = naive_metrics(label, probability)
    assert {name: evaluation[name] for name in expected} == pytest.approx(expected)
    assert evaluation["auroc"] == pytest.approx(roc_auc_score(label, probability))
    assert evaluation["auprc"] == pytest.approx(average_precision_score(label, probability))
    assert evaluation["brier"] == pytest.approx(brier_score_loss(label, probability))
    assert rank_predictions(label, probability) == {name: evaluation[name] for name in ("auroc", "auprc")}


def test_bins_are_the_library_s() -> None:
    rng = np.random.default_rng(0)
    label, probability = rng.integers(0, 2, 1000), np.round(rng.random(1000), 2)
    observed, predicted = calibration_curve(label, probability, n_bins=CALIBRATION_BINS, strategy="quantile")
    edges = np.percentile(probability, np.linspace(0, 100, CALIBRATION_BINS + 1))[1:-1]
    mass = np.bincount(np.searchsorted(edges, probability)) / 1000
    assert evaluate_predictions(label, probability)["ece"] == pytest.approx(mass @ np.abs(observed - predicted))


def test_unlabelled_are_left_out_and_counted() -> None:
    label, probability = np.array([0, -1, 1, -1, 0]), np.array([0.2, 0.9, 0.7, 0.1, 0.8])
    evaluation = evaluate_predictions(label, probability)
    assert (evaluation["num_labelled"], evaluation["num_unlabelled"], evaluation["num_positive"]) == (3, 2, 1)
    labelled = label >= 0
    alone = evaluate_predictions(label[labelled], probability[labelled])
    assert evaluation == alone | {"num_unlabelled": 2}
    assert rank_predictions(label, probability) == {"auroc": 0.5, "auprc": 0.5}


@pytest.mark.parametrize("label", [[], [-1, -1], [0, 0, 0], [1, -1]])
def test_what_is_undefined_is_none(label: list[int]) -> None:
    probability = np.linspace(0.1, 0.9, len(label))
    evaluation = evaluate_predictions(np.array(label, dtype=np.int64), probability)
    json.dumps(evaluation, allow_nan=False)
    assert evaluation["auroc"] is evaluation["auprc_low"] is evaluation["min_se_ppv"] is None
    assert (evaluation["brier"] is None) == (evaluation["num_labelled"] == 0)
    assert rank_predictions(np.array(label, dtype=np.int64), probability) == {"auroc": None, "auprc": None}


def test_intervals_hold_the_value_and_narrow_with_patients() -> None:
    rng = np.random.default_rng(1)

    def evaluate(num_patients: int) -> dict[str, float]:
        label = (rng.random(num_patients) < 0.2).astype(np.int64)
        return evaluate_predictions(label, 1 / (1 + np.exp(1.5 - label - rng.normal(size=num_patients))))

    few, many = evaluate(200), evaluate(3200)
    for name in METRICS:
        if name != "ece":  # biased upwards in resamples, as documented
            assert few[f"{name}_low"] < few[name] < few[f"{name}_high"]
        width = [evaluation[f"{name}_high"] - evaluation[f"{name}_low"] for evaluation in (few, many)]
        assert 0 < width[1] < width[0] / 2  # a quarter, by the root of 16

    # The interval of a rate is known: p ± 1.96 √(p (1 - p) / n).
    rate = many["prevalence"]
    assert many["prevalence_high"] - rate == pytest.approx(1.96 * np.sqrt(rate * (1 - rate) / 3200), rel=0.15)


def test_is_a_function_of_the_seed() -> None:
    rng = np.random.default_rng(2)
    label, probability = rng.integers(0, 2, 50), rng.random(50)
    assert evaluate_predictions(label, probability, seed=3) == evaluate_predictions(label, probability, seed=3)
    assert evaluate_predictions(label, probability, seed=3) != evaluate_predictions(label, probability, seed=4)


def test_does_not_depend_on_the_order_of_patients() -> None:
    rng = np.random.default_rng(3)
    label, probability, order = rng.integers(0, 2, 90), rng.integers(0, 6, 90) / 6, rng.permutation(90)
    one, other = (evaluate_predictions(label[i], probability[i]) for i in (np.arange(90), order))
    assert {name: one[name] for name in METRICS} == pytest.approx({name: other[name] for name in METRICS})


@pytest.mark.parametrize("probability", [float("nan"), float("inf"), -0.1, 1.5])
def test_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        evaluate_predictions(np.array([0, 1]), np.array([0.5, probability]))


def test_refuses_other_labels() -> None:
    with pytest.raises(ValueError, match="not among the 2 classes"):
        evaluate_predictions(np.array([0, 2]), np.array([0.5, 0.5]))


def test_samples_of_a_patient_are_drawn_together() -> None:
    """Ten copies of each patient's sample say no more than one: the interval stays, where it would shrink."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 40)
    probability = np.clip(0.3 * label + 0.6 * rng.random(40), 0, 1)
    names = [f"p{number}" for number in range(40)]
    alone = evaluate_predictions(label, probability, patient_id=names)
    copies = evaluate_predictions(np.tile(label, 10), np.tile(probability, 10), patient_id=names * 10)
    as_others = evaluate_predictions(np.tile(label, 10), np.tile(probability, 10))
    for name in ("auroc_low", "auroc_high"):
        assert copies[name] == pytest.approx(alone[name], abs=1e-2)
    widths = [float(each["auroc_high"] or 0) - float(each["auroc_low"] or 0) for each in (copies, as_others)]
    assert widths[0] > 2 * widths[1]


def test_numbers_by_hand() -> None:
    """Labels 1, 2, 4 and 4: errors 1, 0, -1 and 2.  Five pairs differ, of which three are in order and one is tied."""
    label, prediction = np.array([1.0, np.nan, 2, 4, 4]), np.array([2.0, 9, 2, 3, 6])
    found = evaluate_predictions(label, prediction, NUMBER)
    assert (found["num_labelled"], found["num_unlabelled"]) == (4, 1)
    assert found["mae"] == pytest.approx(1.0)
    assert found["rmse"] == pytest.approx(np.sqrt(6 / 4))
    assert found["r2"] == pytest.approx(1 - 6 / (27 / 4))
    assert found["c_index"] == pytest.approx((4 + 0.5) / 5)
    assert found["mae_low"] <= 1.0 <= found["mae_high"]
    assert "num_positive" not in found


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30))
def test_the_c_index_is_that_of_all_pairs(pairs: list[tuple[int, int]]) -> None:
    label, prediction = np.array(pairs, np.float64).T
    with mock.patch("training.quality.NUM_RESAMPLES", 3):
        found = evaluate_predictions(label, prediction, NUMBER)
    different = [(a, b) for a in pairs for b in pairs if a[0] < b[0]]
    won = [1.0 if a[1] < b[1] else 0.5 if a[1] == b[1] else 0.0 for a, b in different]
    assert found["c_index"] == (pytest.approx(np.mean(won)) if won else None)
    assert found["mae"] == pytest.approx(np.abs(label - prediction).mean())


def test_classes_by_hand() -> None:
    """The third class occurs in no sample: means are over the other two."""
    label = np.array([0, 1, -1, 1])
    prediction = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.0, 0.0, 1.0], [0.1, 0.7, 0.2]])
    found = evaluate_predictions(label, prediction, CLASSES)
    assert found["classes"]["a"] == {"num_labelled": 1, "auroc": 1.0, "auprc": 1.0}
    assert found["classes"]["c"] == {"num_labelled": 0, "auroc": None, "auprc": None}
    assert (found["auroc"], found["auprc"]) == (1.0, 1.0)
    assert found["accuracy"] == pytest.approx(2 / 3)
    squares = (0.16 + 0.09 + 0.01) + (0.25 + 0.36 + 0.01) + (0.01 + 0.09 + 0.04)
    assert found["brier"] == pytest.approx(squares / 3)
    assert rank_predictions(label, prediction, CLASSES) == {"auroc": 1.0, "auprc": 1.0}


def test_nothing_is_defined_without_labels() -> None:
    nobody = np.array([-1, -1])
    found = evaluate_predictions(nobody, np.full((2, 3), 1 / 3), CLASSES)
    assert {found[name] for name in ("auroc", "auprc", "accuracy", "brier", "ece")} == {None}
    found = evaluate_predictions(np.full(2, np.nan), np.zeros(2), NUMBER)
    assert {found[name] for name in ("r2", "mae", "rmse", "c_index")} == {None}
    found = evaluate_predictions(np.array([2.0, 2.0]), np.array([1.0, 3.0]), NUMBER)
    assert (found["mae"], found["r2"], found["c_index"]) == (1.0, None, None)


@pytest.mark.parametrize(
    ("label", "prediction", "outcome", "message"),
    [
        (np.array([0, 3]), np.full((2, 3), 1 / 3), CLASSES, "not among the 3 classes"),
        (np.array([0, 1]), np.full((2, 3), np.nan), CLASSES, "not in"),
        (np.array([0.5, 1.0]), np.array([np.inf, 0]), NUMBER, "not finite"),
    ],
)
def test_what_is_no_prediction_is_refused(
    label: np.ndarray, prediction: np.ndarray, outcome: Outcome, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(label, prediction, outcome)
