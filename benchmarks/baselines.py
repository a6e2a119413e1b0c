"""What a model must beat: trees and logistic regression on per-variable summaries, on the same splits.

python -m benchmarks.baselines DATA [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.machine import describe
from model.evaluation import evaluate_predictions
from pipeline.loader import make_loader

SUMMARIES = 6  # mean, least, greatest, first, last, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {**describe(), **baselines(options.data)}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def baselines(data: Path) -> dict[str, object]:
    """Metrics on the test split of models fitted to the train split, and the patients of both."""
    x_train, y_train = summaries(data, "train")
    x_test, y_test = summaries(data, "test")
    seen = np.isfinite(x_train).any(axis=0)
    models = {
        "trees": HistGradientBoostingClassifier(
            max_iter=150, learning_rate=0.06, max_leaf_nodes=15, l2_regularization=1.0, random_state=0
        ),
        "logistic_regression": make_pipeline(
            SimpleImputer(), StandardScaler(), LogisticRegression(C=0.003, max_iter=2000)
        ),
    }
    result: dict[str, object] = {"train": len(y_train), "test": len(y_test)}
    for name, model in models.items():
        model.fit(x_train[:, seen], y_train)
        result[name] = evaluate_predictions(y_test, model.predict_proba(x_test[:, seen])[:, 1])
    return result


def summaries(data: Path, split: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """[P, codes × SUMMARIES], NaN where a variable was not recorded, and [P] labels, of the labelled patients."""
    rows, labels = [], []
    loader = make_loader(data, split=split, batch_size=64, shuffle=False)
    for batch in loader:
        event_offsets = batch.set_offsets[batch.patient_offsets].tolist()
        for b, label in enumerate(batch.label.tolist()):
            if label < 0:
                continue
            events = slice(event_offsets[b], event_offsets[b + 1])
            number = batch.has_value[events].numpy()
            code, value = batch.code[events].numpy()[number], batch.value[events].numpy()[number]
            row = np.full((loader.manifest.num_codes, SUMMARIES), np.nan)
            for variable in np.unique(code):
                own = value[code == variable]
                row[variable] = (own.mean(), own.min(), own.max(), own[0], own[-1], len(own))
            rows.append(row.ravel())
            labels.append(label)
    return np.array(rows), np.array(labels, dtype=np.int64)


if __name__ == "__main__":
    main()
