"""Training on a part of each patient's events, another part at every step.

A patient who was measured less must still be understood; and 2,500 stays seen ten times over are learned by heart,
unless they are never the same twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.losses import LossCounts
from model.noise import PatientNoise
from pipeline.arrays import offsets_from_sizes
from pipeline.loading.batch import PatientBatch
from pipeline.loading.place import BatchPlace

_EVENT_SALT, _PATIENT_SALT = 8, 9


def drop_events(batch: PatientBatch, rate: float, *, seed: int, step: int) -> PatientBatch:
    """Return the batch without some events, and without sets that are then empty; a patient's first event stays.

    Each patient has a rate of its own, uniform between 0 and twice ``rate``, so that dense and sparse views of a
    patient are both seen.  What is left out depends on (seed, step, patient, position), not on who shares the batch.
    """
    if rate == 0:
        return batch
    return batch.keep_events(_draw_kept(batch.sample_key, batch.events_per_patient, rate, seed=seed, step=step))


def count_after_dropout(place: BatchPlace, rate: float, *, seed: int) -> LossCounts:
    """Return the exact numbers of events, sets and labels of the global batch that remain after :func:`drop_events`.

    Every rank computes them alike from ids and lengths, so that no rank has to ask another.
    """
    whole = place.global_batch()
    set_offsets = offsets_from_sizes(whole.set_size)
    num_events = np.diff(set_offsets[offsets_from_sizes(whole.num_sets)])
    keep = _draw_kept(whole.sample_key, torch.from_numpy(num_events), rate, seed=seed, step=place.step).numpy()
    kept_before = offsets_from_sizes(keep)
    num_sets = int(np.count_nonzero(np.diff(kept_before[set_offsets])))
    return LossCounts(num_events=int(kept_before[-1]), num_sets=num_sets, num_labelled=place.counts.num_labelled)


def _draw_kept(sample_key: list[str], num_events_B: Tensor, rate: float, *, seed: int, step: int) -> Tensor:
    """Return [E] bool: which events are kept of patients with ``num_events_B`` [B] events."""
    total = int(num_events_B.sum())
    patient_E = torch.repeat_interleave(num_events_B, output_size=total)
    first_B = num_events_B.cumsum(0) - num_events_B
    position_E = torch.arange(total) - first_B[patient_E]
    noise = PatientNoise.for_step(sample_key, seed=seed, step=step)
    rate_B = 2 * rate * noise.for_patients().uniform(_PATIENT_SALT)
    keep_E = noise.for_rows(patient_E, position_E).uniform(_EVENT_SALT) >= rate_B[patient_E]
    return keep_E | (position_E == 0)
