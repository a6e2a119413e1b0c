"""What a model must beat: trees and logistic regression on summaries of each variable, on the same splits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.loading.batch import PatientBatch
from pipeline.schema import UNLABELLED
from training.quality import Metrics, evaluate_predictions

SUMMARIES = 6  # mean, least, greatest, first, last, count


def fit_baselines(
    train: Iterable[PatientBatch], test: Iterable[PatientBatch], num_codes: int
) -> dict[str, Metrics | None]:
    """Return metrics on the labelled patients of ``test`` of models fitted to those of ``train``, if these have both
    outcomes.
    """
    x_train, y_train, _ = summaries(train, num_codes)
    x_test, y_test, patient_id = summaries(test, num_codes)
    seen = np.isfinite(x_train).any(axis=0)
    models = {
        "trees": HistGradientBoostingClassifier(
            max_iter=150, learning_rate=0.06, max_leaf_nodes=15, l2_regularization=1.0, random_state=0
        ),
        "logistic_regression": make_pipeline(
            SimpleImputer(), StandardScaler(), LogisticRegression(C=0.003, max_iter=2000)
        ),
    }
    result: dict[str, Metrics | None] = dict.fromkeys(models)
    if len(np.unique(y_train)) > 1 and len(y_test):
        for name, model in models.items():
            model.fit(x_train[:, seen], y_train)
            probability = model.predict_proba(x_test[:, seen])[:, 1]
            result[name] = evaluate_predictions(y_test, probability, patient_id=patient_id)
    return result


def summaries(
    batches: Iterable[PatientBatch], num_codes: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], list[str]]:
    """Return [P, num_codes × SUMMARIES] of the labelled samples, NaN where a variable has no number, labels and ids."""
    rows, labels, patient_id = [np.zeros((0, num_codes * SUMMARIES))], list[int](), list[str]()
    for batch in batches:
        event_offsets = batch.set_offsets[batch.patient_offsets].tolist()
        for b, label in enumerate(batch.label.tolist()):
            if label == UNLABELLED:
                continue
            events = slice(event_offsets[b], event_offsets[b + 1])
            number = batch.has_value[events].numpy()
            code, value = batch.code[events].numpy()[number], batch.value[events].numpy()[number]
            row = np.full((num_codes, SUMMARIES), np.nan)
            for variable in np.unique(code):
                own = value[code == variable]
                row[variable] = (own.mean(), own.min(), own.max(), own[0], own[-1], len(own))
            rows.append(row.reshape(1, -1))
            labels.append(label)
            patient_id.append(batch.patient_id[b])
    return np.concatenate(rows), np.array(labels, dtype=np.int64), patient_id
