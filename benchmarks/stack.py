"""The bar: boosted trees, a wide linear model and extra trees on summaries of each stay, and their mean logit.

Summaries are in raw units, so they do not depend on a split: of each variable mean, least, greatest, first, last,
standard deviation, count, hours since first and since last, a recent mean (half as heavy every six hours), slope, and
mean, least, greatest, last and count of the last 12 hours and of the first 24; and a few ratios and changes that are
known in intensive care.  NaN = never recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.loader import make_loader
from pipeline.schema import FIRST_CODE

Floats = npt.NDArray[np.float64]

HALF_LIFE_HOURS = 6.0
WINDOWS = {"last 12 h": (36.0, 48.0), "first 24 h": (0.0, 24.0)}
WHOLE = ("mean", "least", "greatest", "first", "last", "std", "count", "since first", "since last", "recent", "slope")
PART = ("mean", "least", "greatest", "last", "count")
RATIOS = (("PaO2", "FiO2"), ("HR", "SysABP"), ("BUN", "Creatinine"), ("Urine", "Weight"))
CHANGES = ("GCS", "Lactate")

LINEAR_C = 0.003
TREE_SEEDS = (0, 1, 2)


class Stays(NamedTuple):
    """Summaries [N, F] of the labelled stays of a data set, with their names, labels [N] and ids."""

    features: Floats
    names: list[str]
    label: npt.NDArray[np.int64]
    patient_id: list[str]


def summarize(data: Path) -> Stays:
    """Return the summaries of all labelled stays of the splits of a data set, in order of their ids."""
    loaders = [make_loader(data, split=split, batch_size=256, shuffle=False) for split in ("train", "valid", "test")]
    vocabulary = read_vocabulary(data, loaders[0].manifest)
    variables = vocabulary["variable"].to_pylist()
    mean, std = vocabulary["mean"].to_numpy(), vocabulary["std"].to_numpy()
    rows, labels, ids = [], [], []
    for batch in (batch for loader in loaders for batch in loader):
        hours = batch.minute.double().numpy()[batch.set_of_event.numpy()] / 60
        code, has_value = batch.code.numpy(), batch.has_value.numpy()
        raw = batch.value.double().numpy() * std[code] + mean[code]
        bounds = batch.set_offsets[batch.patient_offsets].numpy()
        for number, (label, patient) in enumerate(zip(batch.label.tolist(), batch.patient_id, strict=True)):
            own = slice(bounds[number], bounds[number + 1])
            if label >= 0:
                number_of = has_value[own]
                rows.append(_summarize(code[own][number_of], raw[own][number_of], hours[own][number_of], variables))
                labels.append(label)
                ids.append(patient)
    order = np.argsort(ids)
    names = [f"{name}, {what}" for name in variables[FIRST_CODE:] for what in _names_of_variable()]
    names += [f"{a} / {b}" for a, b in RATIOS] + [f"change of {name}" for name in CHANGES] + ["events"]
    return Stays(np.array(rows)[order], names, np.array(labels)[order], [ids[at] for at in order])


def _names_of_variable() -> list[str]:
    return [*WHOLE, *(f"{window}, {what}" for window in WINDOWS for what in PART)]


def _summarize(code: npt.NDArray[Any], value: Floats, hours: Floats, variables: list[str]) -> Floats:
    """Return the summaries [F] of the numbers of one stay."""
    table = np.full((len(variables), len(_names_of_variable())), np.nan)
    table[:, WHOLE.index("count")] = 0
    end = hours.max(initial=0.0)
    for variable in np.unique(code):
        own = code == variable
        v, h = value[own], hours[own]
        weight = 0.5 ** ((end - h) / HALF_LIFE_HOURS)
        slope = np.polyfit(h, v, 1)[0] if np.ptp(h) > 0 else 0.0
        whole = [v.mean(), v.min(), v.max(), v[0], v[-1], v.std(), len(v), end - h[0], end - h[-1]]
        parts = [list(_summarize_part(v[(h >= start) & (h <= stop)])) for start, stop in WINDOWS.values()]
        table[variable] = [*whole, weight @ v / max(weight.sum(), 1e-12), slope, *parts[0], *parts[1]]
    of = {name: table[number] for number, name in enumerate(variables)}
    nothing, mean, first, last = np.full(table.shape[1], np.nan), 0, WHOLE.index("first"), WHOLE.index("last")

    def ratio(a: str, b: str) -> float:
        above, below = of.get(a, nothing)[mean], of.get(b, nothing)[mean]
        return float(above / below) if below else np.nan

    changes = [of.get(name, nothing)[last] - of.get(name, nothing)[first] for name in CHANGES]
    return np.array([*table[FIRST_CODE:].ravel(), *(ratio(a, b) for a, b in RATIOS), *changes, len(code)])


def _summarize_part(value: Floats) -> Iterator[float]:
    if len(value):
        yield from (value.mean(), value.min(), value.max(), value[-1])
    else:
        yield from [np.nan] * 4
    yield len(value)


def fit_stack(x_train: Floats, y_train: npt.NDArray[np.int64], x_test: Floats) -> dict[str, Floats]:
    """Return the probability [N] of each test stay, by each model and by their mean logit."""
    seen = np.isfinite(x_train).any(axis=0)
    x_train, x_test = x_train[:, seen], x_test[:, seen]
    models: dict[str, list[BaseEstimator]] = {"boosted trees": [], "wide linear": [_wide_linear()], "extra trees": []}
    for seed in TREE_SEEDS:
        shape = {"max_iter": 700, "max_leaf_nodes": 12, "learning_rate": 0.02, "max_features": 0.08}
        models["boosted trees"].append(HistGradientBoostingClassifier(**shape, random_state=seed))
    trees = ExtraTreesClassifier(500, min_samples_leaf=5, max_features=0.1, n_jobs=1, random_state=0)
    models["extra trees"].append(make_pipeline(SimpleImputer(strategy="median", add_indicator=True), trees))
    found: dict[str, Floats] = {}
    for name, members in models.items():
        answers = [member.fit(x_train, y_train).predict_proba(x_test)[:, 1] for member in members]
        found[name] = np.mean(answers, axis=0)
    logits = [np.log(p / (1 - p)) for p in (answer.clip(1e-6, 1 - 1e-6) for answer in found.values())]
    return found | {"stack": 1 / (1 + np.exp(-np.mean(logits, axis=0)))}


def _wide_linear() -> BaseEstimator:
    """Logistic regression on the z-score of each summary, its cosine, and whether it is missing."""
    scale = make_pipeline(StandardScaler(), FunctionTransformer(_widen))
    return make_pipeline(scale, LogisticRegression(C=LINEAR_C, max_iter=3000))


def _widen(z: Floats) -> Floats:
    missing = np.isnan(z)
    z = np.where(missing, 0.0, z.clip(-4, 4))
    return np.hstack([z, np.where(missing, 0.0, np.cos(z)), missing])
