"""Made-up patients with the set sizes of intensive-care stays: single batches, and whole data directories."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from pipeline import PatientBatch
from pipeline.schema import FIRST_CODE
from tests.data_dirs import Patient, write_data_dir

# Share of sets that have 1, 2, … 16 events, in PhysioNet 2012 set A.
SET_SIZES = np.array([69, 39, 59, 88, 192, 212, 145, 87, 48, 33, 10, 4, 2, 2, 4, 6]) / 1000

NUM_SYNTHETIC_CODES = 43
"""As many as PhysioNet 2012 has, padding and unknown included."""


def invented(batch_size: int, seed: int, *, sets: int | None = None, events: int | None = None) -> PatientBatch:
    """Make up a batch with as many sets and events per set as intensive-care stays have, or as many as asked for."""
    generator = np.random.default_rng(seed)
    num_sets = generator.integers(66, 81, batch_size) if sets is None else np.full(batch_size, sets)
    sizes = generator.choice(np.arange(1, 17), num_sets.sum(), p=SET_SIZES / SET_SIZES.sum())
    sizes = sizes if events is None else np.full_like(sizes, events)
    num_events = int(sizes.sum())
    minutes = [np.sort(generator.uniform(0, 2880, count)) for count in num_sets]
    zero = np.zeros(1, np.int64)
    return PatientBatch(
        code=torch.from_numpy(generator.integers(2, 43, num_events)),
        value=torch.from_numpy(generator.standard_normal(num_events, np.float32)),
        has_value=torch.ones(num_events, dtype=torch.bool),
        set_offsets=torch.from_numpy(np.concatenate([zero, sizes.cumsum()])),
        minute=torch.from_numpy(np.concatenate(minutes).astype(np.float32)),
        patient_offsets=torch.from_numpy(np.concatenate([zero, num_sets.cumsum()])),
        label=torch.from_numpy(generator.integers(0, 2, batch_size)),
        patient_id=[str(number) for number in range(batch_size)],
    )


def write_synthetic_data(
    directory: Path, *, num_patients: int, sets: int = 73, shard_size: int = 1000, seed: int = 0
) -> Path:
    """Write a data directory of made-up patients, with pyarrow alone, whose outcome can be learned.

    Sets are as large as those of intensive-care stays; patients have between half and one and a half times ``sets``
    of them.  One variable is higher, in the mean, in patients with the outcome.  Four fifths train, a tenth validates,
    a tenth tests.  Shards have ``shard_size`` patients.
    """
    rng = np.random.default_rng(seed)
    patients = []
    for number in range(num_patients):
        label = int(rng.random() < 0.3)
        num_sets = rng.integers(sets // 2, sets + sets // 2 + 1)
        sizes = rng.choice(np.arange(1, 17), num_sets, p=SET_SIZES / SET_SIZES.sum())
        codes = rng.integers(FIRST_CODE, NUM_SYNTHETIC_CODES, sizes.sum())
        values = rng.standard_normal(sizes.sum()) + (codes == FIRST_CODE) * label
        minutes = np.sort(rng.choice(4320, len(sizes), replace=False)).astype(float).tolist()
        events = zip(codes.tolist(), values.tolist(), strict=True)
        filled = [
            (minute, list(itertools.islice(events, size))) for minute, size in zip(minutes, sizes.tolist(), strict=True)
        ]
        patients.append(Patient(patient_id=f"synthetic-{number}", label=label, sets=filled))
    ends = num_patients * 8 // 10, num_patients * 9 // 10
    splits = {"train": patients[: ends[0]], "valid": patients[ends[0] : ends[1]], "test": patients[ends[1] :]}
    return write_data_dir(directory, splits, shard_size=shard_size, num_codes=NUM_SYNTHETIC_CODES)
