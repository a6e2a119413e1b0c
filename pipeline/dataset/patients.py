"""Some patients of a split: which of them, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.arrays import Ints, offsets_from_sizes
from pipeline.dataset.manifest import ShardEntry

ChosenPatients: TypeAlias = Mapping[str, npt.NDArray[np.bool_]]
"""Which patients [P] of each shard are used, by its path; of a shard that is not named, none are."""


class SplitPart(NamedTuple):
    """Some patients of a split, by its name."""

    split: str
    patients: ChosenPatients | None


def patient_offsets(entries: Sequence[ShardEntry]) -> Ints:
    """Return [n+1] the first patient of each of some shards, one shard after another, and the end of the last."""
    return offsets_from_sizes(np.array([entry.num_patients for entry in entries], np.int64))


def split_by_shard(entries: Sequence[ShardEntry], of_patient: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return what is said of the patients [P] of some shards, one shard after another, by the shard's path."""
    paths = (entry.path for entry in entries)
    return dict(zip(paths, np.split(of_patient, patient_offsets(entries)[1:-1]), strict=True))


def is_chosen(entries: Sequence[ShardEntry], chosen: ChosenPatients) -> npt.NDArray[np.bool_]:
    """Return [P] which patients of some shards, one shard after another, are chosen."""
    of_shard = [chosen.get(entry.path, np.zeros(entry.num_patients, np.bool_)) for entry in entries]
    return np.concatenate([*of_shard, np.zeros(0, np.bool_)])


def fingerprint_patients(chosen: ChosenPatients) -> str:
    """Return a short checksum of which patients are chosen."""
    digest = hashlib.sha256()
    for path in sorted(chosen):
        digest.update(f"{path} {len(chosen[path])} ".encode() + np.packbits(chosen[path]).tobytes())
    return digest.hexdigest()[:12]
