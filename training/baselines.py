"""What a model must beat: trees and linear models on summaries of each variable, on the same splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from model.config import Outcome
from pipeline.arrays import is_labelled
from pipeline.loading.batch import PatientBatch
from training.predictions import labels_of_batch
from training.quality import Floats, Metrics, evaluate_predictions

SUMMARIES = 6  # mean, least, greatest, first, last, count


def fit_baselines(
    train: Iterable[PatientBatch], test: Iterable[PatientBatch], num_codes: int, outcomes: tuple[Outcome, ...]
) -> list[dict[str, Metrics | None]]:
    """Return, for each outcome, metrics on the labelled samples of ``test`` of models fitted to those of ``train``.

    They are None where these have less than two classes, or nobody is labelled.
    """
    x_train, labels_train, _ = summaries(train, num_codes, outcomes)
    x_test, labels_test, patient_id = summaries(test, num_codes, outcomes)
    return [
        _fit_outcome(outcome, x_train, labels_train[:, task], x_test, labels_test[:, task], patient_id)
        for task, outcome in enumerate(outcomes)
    ]


def _fit_outcome(
    outcome: Outcome, x_train: Floats, label_train: Floats, x_test: Floats, label_test: Floats, patient_id: list[str]
) -> dict[str, Metrics | None]:
    known, tested = is_labelled(label_train), is_labelled(label_test)
    seen = np.isfinite(x_train[known]).any(axis=0)
    trees = {"max_iter": 150, "learning_rate": 0.06, "max_leaf_nodes": 15, "l2_regularization": 1.0, "random_state": 0}
    prepare = (SimpleImputer(), StandardScaler())
    models: dict[str, Any] = {
        "trees": HistGradientBoostingClassifier(**trees),
        "logistic_regression": make_pipeline(*prepare, LogisticRegression(C=0.003, max_iter=2000)),
    }
    if outcome.kind == "regression":
        models = {
            "trees": HistGradientBoostingRegressor(**trees),
            "ridge": make_pipeline(*prepare, Ridge(alpha=1000.0)),
        }
    result: dict[str, Metrics | None] = dict.fromkeys(models)
    if len(np.unique(label_train[known])) > 1 and tested.any():
        ids = [patient for patient, used in zip(patient_id, tested, strict=True) if used]
        for name, model in models.items():
            model.fit(x_train[known][:, seen], label_train[known])
            prediction = _predict(model, x_test[tested][:, seen], outcome)
            result[name] = evaluate_predictions(label_test[tested], prediction, outcome, patient_id=ids)
    return result


def _predict(model: Any, x: Floats, outcome: Outcome) -> Floats:
    """Return what a fitted model predicts, as :func:`evaluate_predictions` takes it; 0 for classes it never saw."""
    if outcome.kind == "regression":
        prediction: Floats = model.predict(x)
        return prediction
    probability = np.zeros((len(x), len(outcome.classes)))
    probability[:, model.classes_.astype(np.int64)] = model.predict_proba(x)
    return probability[:, 1] if outcome.kind == "binary" else probability


def summaries(
    batches: Iterable[PatientBatch], num_codes: int, outcomes: Sequence[Outcome]
) -> tuple[Floats, Floats, list[str]]:
    """Return [P, num_codes × SUMMARIES] of the samples with a label, NaN where a variable has no number, the labels
    [P, T], NaN = unlabelled, and the ids.
    """
    rows, labels, patient_id = [np.zeros((0, num_codes * SUMMARIES))], [np.zeros((0, len(outcomes)))], list[str]()
    for batch in batches:
        event_offsets = batch.set_offsets[batch.patient_offsets].tolist()
        label_BT = np.column_stack(labels_of_batch(batch, outcomes))
        for b in np.flatnonzero(is_labelled(label_BT).any(1)):
            events = slice(event_offsets[b], event_offsets[b + 1])
            number = batch.has_value[events].numpy()
            code, value = batch.code[events].numpy()[number], batch.value[events].numpy()[number]
            row = np.full((num_codes, SUMMARIES), np.nan)
            for variable in np.unique(code):
                own = value[code == variable]
                row[variable] = (own.mean(), own.min(), own.max(), own[0], own[-1], len(own))
            rows.append(row.reshape(1, -1))
            labels.append(label_BT[b : b + 1])
            patient_id.append(batch.patient_id[b])
    return np.concatenate(rows), np.concatenate(labels), patient_id
