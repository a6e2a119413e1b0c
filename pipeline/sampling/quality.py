"""Measures of a plan: padding, mixing, balance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Floats, Ints, is_labelled
from pipeline.sampling.plan import EpochPlan, split_across_ranks


def padding_waste(plan: EpochPlan, lengths: Ints) -> float:
    """Return padded cells ÷ all cells, each batch as wide as its longest patient; 0 for a plan without patients."""
    if not len(plan.order):
        return 0.0
    longest = np.maximum.reduceat(lengths[plan.order], plan.batch_offsets[:-1])
    return 1.0 - float(lengths.sum()) / float((longest * plan.batch_sizes).sum())


def pairs_meeting_again(plan: EpochPlan, later: EpochPlan) -> float:
    """Return which part of the pairs that share a batch shares one in ``later`` too; NaN without pairs."""
    both = _batch_of_patient(plan) * later.num_batches + _batch_of_patient(later)
    pairs = int((plan.batch_sizes * (plan.batch_sizes - 1)).sum())
    together = np.unique(both, return_counts=True)[1]
    return float((together * (together - 1)).sum() / pairs) if pairs else float("nan")


def neighbour_correlation(plan: EpochPlan, lengths: Ints) -> float:
    """Return the correlation of the mean lengths of a batch and the next one; NaN if it has no meaning."""
    means = plan.sum_per_batch(lengths) / plan.batch_sizes
    return _correlation(means[:-1], means[1:])


def label_correlation(plan: EpochPlan, lengths: Ints, label: npt.NDArray[Any]) -> float:
    """Return the correlation of a labelled patient's label with the mean length of the patient's batch.

    ``label`` is [P] numbers, also of classes, -1 or NaN = unlabelled; of [P, T] the first column counts.
    """
    label = label[:, 0] if label.ndim > 1 else label
    means = (plan.sum_per_batch(lengths) / plan.batch_sizes)[_batch_of_patient(plan)]
    labelled = is_labelled(label)
    return _correlation(means[labelled], label[labelled].astype(np.float64))


def rank_imbalance(plan: EpochPlan, cost: Floats, world_size: int) -> float:
    """Return the mean over the steps of (maximum − minimum) ÷ mean cost of a rank: about the waiting part of a step."""
    if not len(plan.order):
        return 0.0
    parts = [split_across_ranks(plan, cost, rank=rank, world_size=world_size) for rank in range(world_size)]
    costs = np.stack([part.sum_per_batch(cost) for part in parts])
    return float(np.mean(np.ptp(costs, axis=0) / costs.mean(axis=0)))


def _batch_of_patient(plan: EpochPlan) -> Ints:
    """[P] int64, the batch of each patient."""
    batch = np.empty(len(plan.order), dtype=np.int64)
    batch[plan.order] = np.repeat(np.arange(plan.num_batches), plan.batch_sizes)
    return batch


def _correlation(a: Floats, b: Floats) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
