"""The bar: boosted trees, a wide linear model and extra trees on summaries of each stay, and their mean logit.

The models are those that teach (:mod:`training.teacher`), with more seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.arrays import harden, is_labelled
from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.loader import make_loader
from training.summaries import Floats, Summaries


class Stays(NamedTuple):
    """Summaries [N, F] of the labelled stays of a data set, with their names, labels [N] and ids."""

    features: Floats
    names: list[str]
    label: npt.NDArray[np.int64]
    patient_id: list[str]


def summarize(data: Path) -> Stays:
    """Return the summaries of all labelled stays of the splits of a data set, in order of their ids."""
    loaders = [make_loader(data, split=split, batch_size=256, shuffle=False) for split in ("train", "valid", "test")]
    summaries = Summaries(read_vocabulary(data, loaders[0].manifest))
    rows, labels, ids = [], [], list[str]()
    for batch in (batch for loader in loaders for batch in loader):
        label = batch.label.numpy()
        known = np.flatnonzero(is_labelled(label))
        rows.append(summaries.of_batch(batch)[known])
        labels.append(harden(label[known]).astype(np.int64))
        ids += [batch.patient_id[at] for at in known]
    order = np.argsort(ids)
    return Stays(np.concatenate(rows)[order], summaries.names, np.concatenate(labels)[order], [ids[at] for at in order])
