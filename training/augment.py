"""Augmentation by event dropout: each training step sees another part of each patient's events.

The model then learns to predict from fewer measurements, and does not memorise a small data set, because it never sees
a patient twice in the same form.
"""

from __future__ import annotations

import torch

from model.noise import PatientNoise
from pipeline.loading.batch import PatientBatch

_EVENT_SALT, _PATIENT_SALT = 8, 9


def drop_events(batch: PatientBatch, rate: float, *, seed: int, step: int) -> PatientBatch:
    """Return the batch without some of its events, and without sets that are then empty; a patient's first event stays.

    Each patient has a rate of its own, uniform between 0 and twice ``rate``, so that dense and sparse views of a
    patient are both seen.  What is left out depends on (seed, step, patient, position), not on who shares the batch.

    Args:
        batch: on the CPU.
        rate: expected fraction of events left out, at most ½; 0 = none.
        seed: the seed of the noise.
        step: the training step.
    """
    if rate == 0:
        return batch
    num_events_B = batch.events_per_patient
    patient_E = torch.repeat_interleave(num_events_B, output_size=batch.num_events)
    first_B = batch.set_offsets[batch.patient_offsets[:-1]]
    position_E = torch.arange(batch.num_events) - first_B[patient_E]
    noise = PatientNoise.for_step(batch.patient_id, seed=seed, step=step)
    rate_B = 2 * rate * noise.for_patients().uniform(_PATIENT_SALT)
    keep_E = noise.for_rows(patient_E, position_E).uniform(_EVENT_SALT) >= rate_B[patient_E]
    return batch.keep_events(keep_E | (position_E == 0))
