"""The boosted trees of the outcome head (:mod:`model.trees`): when there are some, and how they are fitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import ModelOptions
from model.features import VariableLayout, summary_features
from model.losses import LossOptions
from model.prefixes import Prefixes
from model.seqsetvae import SeqSetVAE
from model.trees import DEPTH, NUM_TREES, BoostedTrees
from pipeline.arrays import is_labelled
from pipeline.dataset.tables import read_vocabulary
from pipeline.schema import UserError
from training.console import log_main
from training.data import DataSet
from training.parallel import World
from training.predictions import labels_of_batch
from training.summaries import most_frequent
from training.teacher import check_labels_for_trees, has_labels_for_trees, read_train_samples

AUTO_SHARE = 0.25

LEARNING_RATE, FEATURE_SHARE, LEAST_OF_LEAF = 0.05, 0.08, 5
"""How much each tree mends of what those before it left, the share of features that a split chooses among, and the
least number of samples below a leaf."""


def choose_tree_share(options: ModelOptions, loss: LossOptions, data: DataSet) -> float:
    """Return the share of boosted trees in the logit of the outcome; 0 = there are none.

    Raises:
        UserError: they are asked for, and there is not one binary task alone, no summary features or too many samples.
    """
    share, are_used = options.tree_share, loss.learns_outcome and options.without != "summary_features"
    if share == "auto":
        return AUTO_SHARE if are_used and has_labels_for_trees(data) else 0.0
    if not share or not loss.learns_outcome:
        return 0.0
    if not are_used:
        raise UserError(f"--tree_share {share:g} needs the summary features; leave out one of it and --without")
    check_labels_for_trees(data, f"--tree_share {share:g}")
    return share


def fit_trees(model: SeqSetVAE, data: DataSet, world: World, loss: LossOptions, *, seed: int) -> None:
    """Fit the boosted trees of a model to the labelled training samples, on rank 0, where its head has some.

    Where training answers after some hours too, trees learn from what samples were then, which weighs as much.

    Raises:
        UserError: the training samples have not both labels.
    """
    trees = model.head.trees
    if trees is None:
        return
    log_main(world, "fitting the boosted trees of the outcome head (--tree_share 0: none)")
    found = None
    if world.is_main:
        found = BoostedTrees(data.manifest.num_codes)
        codes = most_frequent(read_vocabulary(data.folder, data.manifest), found.num_variables)
        found.place[codes] = torch.arange(len(codes))
        samples = zip(*_read_samples(found, data, loss), strict=True)
        _fit(found, *(torch.cat(parts).numpy() for parts in samples), seed=seed)
    state = world.gather(None if found is None else found.state_dict())[0]
    assert state is not None
    trees.load_state_dict(state)


def _read_samples(trees: BoostedTrees, data: DataSet, loss: LossOptions) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the features [B, X], the labels [B] and the weights [B] of labelled training samples."""
    hours = loss.prefix_hours
    for batch in read_train_samples(data):
        samples = Prefixes.after_hours(batch, hours).separate(batch) if hours else batch
        (label,) = labels_of_batch(samples, data.outcomes)
        variables = VariableLayout.build(samples)
        known = np.flatnonzero(is_labelled(label))
        table = trees.tabulate(summary_features(samples, variables), variables)
        weight = torch.full((len(table),), loss.prefix_weight / max(len(hours), 1))
        weight[: batch.num_patients] = 1
        yield table[known], torch.from_numpy(label[known].astype(np.int64)), weight[known]


def _fit(
    trees: BoostedTrees,
    table: npt.NDArray[np.float32],
    label: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float32],
    *,
    seed: int,
) -> None:
    from sklearn.ensemble import GradientBoostingClassifier  # noqa: PLC0415 (a second that few runs need)

    if len(set(label.tolist())) < 2:
        raise UserError("--tree_share needs training samples of both classes; leave it out")
    shape: dict[str, Any] = {"n_estimators": NUM_TREES, "max_depth": DEPTH, "min_samples_leaf": LEAST_OF_LEAF}
    shape |= {"learning_rate": LEARNING_RATE, "max_features": FEATURE_SHARE, "random_state": seed}
    columns = _choose_columns(table)
    fitted = GradientBoostingClassifier(**shape).fit(table[:, columns], label, weight)
    share = np.average(label, weights=weight)
    trees.bias.fill_(float(np.log(share / (1 - share))))
    for number, (regressor,) in enumerate(fitted.estimators_):
        _complete(trees, number, regressor.tree_, columns)


def _choose_columns(table: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Return the columns that vary, each once: the halves are alike where a variable is never absent."""
    varies = table.min(axis=0) < table.max(axis=0)
    first, second = np.split(table, 2, axis=1)
    varies[first.shape[1] :] &= (first != second).any(axis=0)
    return np.flatnonzero(varies)


def _complete(trees: BoostedTrees, number: int, tree: Any, columns: npt.NDArray[np.intp]) -> None:
    """Copy a tree of scikit-learn; below a leaf that is less deep than others all nodes are that leaf."""
    inner = trees.threshold.shape[1]
    node = [0] * (2 * inner + 1)
    for place in range(inner):
        own = node[place]
        left, right = tree.children_left[own], tree.children_right[own]
        node[2 * place + 1 : 2 * place + 3] = (left, right) if left >= 0 else (own, own)
        if left >= 0:
            trees.feature[number, place] = int(columns[tree.feature[own]])
            trees.threshold[number, place] = _round_down(tree.threshold[own])
    trees.answer[number] = torch.from_numpy(LEARNING_RATE * tree.value[node[inner:], 0, 0]).float()


def _round_down(threshold: float) -> float:
    """Return the greatest float32 that is not above a threshold: the same float32 numbers are at most it."""
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))
