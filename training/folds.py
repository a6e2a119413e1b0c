"""The models of cross-fitting, and which patients each learns from and answers for.

The patients of train and valid are dealt into folds.  For each fold a model learns from all others and predicts it
after every epoch; the final models learn from all.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Ints, harden, is_labelled
from pipeline.dataset.patients import split_by_shard
from training.data import DataSet
from training.options import TrainOptions

FOLD_SALT = 0x666F6C64
"""Makes the random numbers of folds other ones than those of plans."""

LABEL_RANGES = 5
"""Ranges of equal mass of the labels of a regression, over which folds are stratified."""

DEALT_SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One of the models: that of a ``fold`` of a deal of the patients, or a final one.

    Attributes:
        name: of its folder below ``RUN/members``.
        seed: ``--seed`` of its training; of a fold's model also that of the deal.
        repeat: which deal of the patients; of a final model 0.
        fold: which it answers for; None = it learns from all.
    """

    name: str
    seed: int
    repeat: int = 0
    fold: int | None = None

    def options_of(self, options: TrainOptions, *, stop_after: int = 0) -> TrainOptions:
        """Return the options of its own run, which ends after so many epochs; 0 = all."""
        folder = members_folder(options) / self.name
        run = dataclasses.replace(options.run, output_dir=str(folder), seed=self.seed)
        optimisation = dataclasses.replace(
            options.optimisation, stop_after=stop_after or options.optimisation.stop_after
        )
        return dataclasses.replace(options, run=run, optimisation=optimisation)


def members_folder(options: TrainOptions) -> Path:
    """Return the folder of the runs of all models."""
    return Path(options.run.output_dir) / "members"


def fold_members(options: TrainOptions) -> list[Member]:
    """Return the models of all folds of each deal."""
    cross_fit, seed = options.cross_fit, options.run.seed
    places = itertools.product(range(cross_fit.repeats), range(cross_fit.folds))
    return [
        Member(name=f"repeat_{repeat}_fold_{fold}", seed=seed + repeat, repeat=repeat, fold=fold)
        for repeat, fold in places
    ]


def final_members(options: TrainOptions) -> list[Member]:
    """Return the models that learn from all patients."""
    seeds = range(options.run.seed, options.run.seed + options.cross_fit.final_seeds)
    return [Member(name=f"final_{seed}", seed=seed) for seed in seeds]


def select_patients(data: DataSet, member: Member, options: TrainOptions) -> DataSet:
    """Return the data of one model: in ``train`` the patients it learns from, in ``valid`` those it answers for."""
    entries = [entry for split in DEALT_SPLITS for entry in data.manifest.splits.get(split, [])]
    splits = {**data.manifest.splits, "train": entries, "valid": [] if member.fold is None else entries}
    chosen: dict[str, Any] = {}
    if member.fold is not None:
        fold_of_patient = deal_patients(label_strata(data), options.cross_fit.folds, seed=member.seed)
        chosen["valid"] = split_by_shard(entries, fold_of_patient == member.fold)
        chosen["train"] = split_by_shard(entries, fold_of_patient != member.fold)
    manifest = dataclasses.replace(data.manifest, splits=splits)
    bad = [entry for split in DEALT_SPLITS for entry in data.quarantined.get(split, [])]
    quarantined = {**data.quarantined, "train": bad, "valid": []}
    return dataclasses.replace(data, manifest=manifest, quarantined=quarantined, chosen=chosen)


def deal_patients(stratum_P: Ints, folds: int, *, seed: int) -> Ints:
    """Return the fold [P] of each patient.

    Patients are in random order within their stratum, and dealt one after another, so that of each stratum, and of all
    patients, folds differ by at most one.
    """
    rng = np.random.default_rng([seed, FOLD_SALT])
    order = np.lexsort((rng.random(len(stratum_P)), stratum_P))
    fold = np.empty(len(stratum_P), np.int64)
    fold[order] = np.arange(len(order)) % folds
    return fold


def label_strata(data: DataSet) -> Ints:
    """Return the stratum [P] of each patient of train and valid: what labels its samples have.

    Of classes it is the greatest label of each task, of a regression the range in which the mean lies; patients without
    labels, or without samples, are strata of their own.
    """
    entries = [entry for split in DEALT_SPLITS for entry in data.manifest.splits.get(split, [])]
    samples = data.index_of("train").read(entries)
    num_patients = sum(entry.num_patients for entry in entries)
    labels = samples.label if samples.label.ndim > 1 else samples.label[:, None]
    keys = [np.bincount(samples.patient, minlength=num_patients) > 0]
    for task, label in zip(data.tasks, labels.T, strict=True):
        label = harden(label) if task.kind == "binary" else label
        keys.append(_stratify(samples.patient, label, num_patients, is_number=task.kind == "regression"))
    return np.unique(np.stack(keys), axis=1, return_inverse=True)[1].ravel()


def _stratify(patient: Ints, label: npt.NDArray[Any], num_patients: int, *, is_number: bool) -> npt.NDArray[Any]:
    """Return [P] of patients a number that stands for their labels of one task; -1 = none."""
    labelled = is_labelled(label)
    patient, label = patient[labelled], label[labelled].astype(np.float64)
    count = np.bincount(patient, minlength=num_patients)
    if not is_number:
        greatest = np.full(num_patients, -1.0)
        np.maximum.at(greatest, patient, label)
        return greatest
    mean = np.bincount(patient, label, num_patients) / np.maximum(count, 1)
    edges = np.quantile(mean[count > 0], np.linspace(0, 1, LABEL_RANGES + 1)[1:-1]) if count.any() else np.zeros(0)
    return np.where(count > 0, np.searchsorted(edges, mean), -1)
