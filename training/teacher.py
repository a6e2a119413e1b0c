"""Distillation: boosted trees, a wide linear model and extra trees on summaries of each sample teach the model.

A model that learns from labels alone must find out from each 0 or 1 what a sample's risk was.  A teacher that is
fitted to other patients knows it better, so the model learns from both (Hinton et al. 2015, arXiv:1503.02531).  Nobody
is answered for by a teacher that learned from the same patient, or the answers would be the labels once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.losses import LossOptions
from pipeline.arrays import is_labelled
from pipeline.dataset.patients import fingerprint_patients
from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.loader import PatientLoader
from pipeline.schema import UserError
from training.console import log_main
from training.data import DataSet
from training.parallel import World, choose_threads
from training.predictions import labels_of_batch
from training.summaries import Floats, Summaries
from training.targets import Teacher

TEACHER_FOLDS = 4
"""Parts into which patients are dealt: each is answered for by models of the others."""

FEWEST_TAUGHT, MOST_TAUGHT = 500, 50_000
"""Labelled samples from which on, and up to which, trees are fitted where nobody asks for them: of fewer they learn
little, of more the model learns enough by itself.
"""

FEWEST_OF_CLASS = 50
"""Samples of each class that they need then."""

AUTO_WEIGHT = 0.4

_ANSWERS: dict[tuple[str, ...], dict[str, float]] = {}
"""What was answered last in this process: final models of other seeds learn from the same patients."""

LINEAR_C = 0.003
TREE_SEEDS = (0, 1, 2)


def find_teacher(
    data: DataSet, world: World, loss: LossOptions, kept: Path | None, *, threads: int | None = None
) -> Teacher | None:
    """Return the teacher of a run, fitted anew by ``threads``, or ``kept`` in a file by a run that goes on.

    By default there are as many threads as cores that idle.  None = the run has no teacher.
    """
    weight = loss.distill if loss.learns_outcome else 0.0
    if weight == "auto":
        weight = AUTO_WEIGHT if has_labels_for_trees(data) else 0.0
    if not weight:
        return None
    if kept is not None:
        return Teacher.load(kept)
    log_main(world, "fitting trees and linear models that teach (--distill 0: none)")
    return fit_teacher(data, world, weight=weight, threads=threads)


def has_labels_for_trees(data: DataSet) -> bool:
    """Return whether trees are fitted where nobody asks for them: to teach, and for the outcome head."""
    if [task.kind for task in data.tasks] != ["binary"]:
        return False
    counts = data.tasks[0].splits["train"]
    return FEWEST_TAUGHT <= counts.num_labelled <= MOST_TAUGHT and min(counts.class_counts) >= FEWEST_OF_CLASS


def check_labels_for_trees(data: DataSet, flag: str) -> None:
    """Raise UserError, naming the ``flag`` that asks for trees, where they cannot be fitted to the task."""
    if [task.kind for task in data.tasks] != ["binary"]:
        raise UserError(f"{flag} is for one binary task; leave it out, or name one with --task")
    if (num_labelled := data.tasks[0].splits["train"].num_labelled) > MOST_TAUGHT:
        few = f"trees are fitted to at most {MOST_TAUGHT:,} samples, and {num_labelled:,} have a label"
        raise UserError(f"{flag}: {few}; leave it out")


def fit_teacher(data: DataSet, world: World, *, weight: float, threads: int | None = None) -> Teacher:
    """Return the teacher of the training samples, fitted by rank 0 and equal on all ranks, whatever the threads.

    Raises:
        UserError: there is not one binary task alone, too few or too many samples have a label, or one class does.
    """
    check_labels_for_trees(data, f"--distill {weight:g}")
    chosen = data.chosen.get("train")
    patients = "all" if chosen is None else fingerprint_patients(chosen)
    key = (data.manifest.fingerprint, data.tasks[0].table_sha256, patients, *data.quarantined_shards)
    if world.is_main and key not in _ANSWERS:
        _ANSWERS.clear()
        _ANSWERS[key] = _answer_in_folds(data, choose_threads(threads, world.alone()))
    found = world.gather(_ANSWERS[key] if world.is_main else None)[0]
    assert found is not None
    return Teacher(weight, found)


def _answer_in_folds(data: DataSet, threads: int) -> dict[str, float]:
    """Return the probability of each labelled training sample by models of other patients; folds side by side."""
    from joblib import Parallel, delayed  # noqa: PLC0415
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415 (a second that few runs need)
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    rows, label, patient, keys = _read_samples(data)
    if min(len(set(patient[label == value].tolist())) for value in (0, 1)) < TEACHER_FOLDS:
        raise UserError(f"--distill needs at least {TEACHER_FOLDS} training patients of each class; leave it out")
    folds = StratifiedGroupKFold(TEACHER_FOLDS, shuffle=True, random_state=0)
    parts = list(folds.split(rows, label, patient))
    tasks = [
        delayed(fit_stack)(rows[others], label[others], rows[own], seeds=(0,), quick=True) for others, own in parts
    ]
    with threadpool_limits(1):  # their matrices are too small to be shared
        answers = Parallel(threads, backend="threading")(tasks)
    probability = np.empty(len(label))
    for (_, own), found in zip(parts, answers, strict=True):
        probability[own] = found["stack"]
    return dict(zip(keys, probability.tolist(), strict=True))


def read_train_samples(data: DataSet) -> PatientLoader:
    """Return large batches of all training samples on the CPU, each sample once and a patient of its own."""
    changes: dict[str, Any] = {"batch_size": 256, "max_events": None, "share_windows": False}
    return data.open_loader("train", seed=0, shuffle=False, world=World(0, 1, torch.device("cpu")), **changes)


def _read_samples(data: DataSet) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[Any], list[str]]:
    """Return summaries [N, F], label [N], patient [N] and key of the labelled training samples."""
    summaries = Summaries(read_vocabulary(data.folder, data.manifest))

    def read() -> Iterator[tuple[Floats, Floats, list[str], list[str]]]:
        for batch in read_train_samples(data):
            (label,) = labels_of_batch(batch, data.outcomes)
            known = np.flatnonzero(is_labelled(label))
            patients, keys = ([of[at] for at in known] for of in (batch.patient_id, batch.sample_key))
            yield summaries.of_batch(batch)[known], label[known], patients, keys

    rows, labels, patients, keys = zip(*read(), strict=True)
    patient = np.unique([name for part in patients for name in part], return_inverse=True)[1]
    label = np.concatenate(labels).astype(np.int64)
    return np.concatenate(rows), label, patient, [key for part in keys for key in part]


def fit_stack(
    x_train: Floats,
    y_train: npt.NDArray[np.int64],
    x_test: Floats,
    seeds: tuple[int, ...] = TREE_SEEDS,
    *,
    quick: bool = False,
) -> dict[str, Floats]:
    """Return the probability [N] of each test sample by each model, and by their mean logit, the ``stack``.

    A ``quick`` one has fewer trees and takes less than half the time; on 4,000 stays it is as good.
    """
    from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier  # noqa: PLC0415
    from sklearn.impute import SimpleImputer  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import FunctionTransformer, StandardScaler  # noqa: PLC0415

    seen = np.isfinite(x_train).any(axis=0)
    x_train, x_test = x_train[:, seen], x_test[:, seen]
    shape = {"max_iter": 700, "learning_rate": 0.02, "max_leaf_nodes": 12, "max_features": 0.08}
    shape |= {"max_iter": 250, "learning_rate": 0.05} if quick else {}
    scale = make_pipeline(StandardScaler(), FunctionTransformer(_widen))
    trees = ExtraTreesClassifier(
        200 if quick else 500, min_samples_leaf=5, max_features=0.1, n_jobs=None if quick else -1, random_state=0
    )
    models: dict[str, list[Any]] = {
        "boosted trees": [HistGradientBoostingClassifier(**shape, random_state=seed) for seed in seeds],
        "wide linear": [make_pipeline(scale, LogisticRegression(C=LINEAR_C, max_iter=3000))],
        "extra trees": [make_pipeline(SimpleImputer(strategy="median", add_indicator=True), trees)],
    }
    found: dict[str, Floats] = {}
    for name, members in models.items():
        answers = [member.fit(x_train, y_train).predict_proba(x_test)[:, 1] for member in members]
        found[name] = np.mean(answers, axis=0)
    logits = [np.log(p / (1 - p)) for p in (answer.clip(1e-6, 1 - 1e-6) for answer in found.values())]
    return found | {"stack": 1 / (1 + np.exp(-np.mean(logits, axis=0)))}


def _widen(z: Floats) -> Floats:
    """Return z-scores, their cosines, and whether each is missing."""
    missing = np.isnan(z)
    z = np.where(missing, 0.0, z.clip(-4, 4))
    return np.hstack([z, np.where(missing, 0.0, np.cos(z)), missing])
