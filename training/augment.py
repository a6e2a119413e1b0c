"""Training on a part of each patient's events, another part at every step.

A patient who was measured less must still be understood; and 2,500 stays seen ten times over are learned by heart,
unless they are never the same twice.
"""

from __future__ import annotations

import torch

from model.noise import PatientNoise, patient_keys
from pipeline.loading.batch import PatientBatch

_EVENT_SALT, _PATIENT_SALT = 8, 9


def drop_events(batch: PatientBatch, rate: float, *, seed: int, step: int) -> PatientBatch:
    """Leave out events, and sets that are then empty; a patient's first event stays.

    Each patient has a rate of its own, uniform between 0 and twice ``rate``, so that dense and sparse views of a
    patient are both seen.  What is left out depends on (seed, step, patient, place), not on who shares the batch.

    Args:
        batch: on the CPU.
        rate: share of events left out in the mean, at most ½; 0 = none.
    """
    if rate == 0:
        return batch
    num_events_B = batch.events_per_patient
    patient_E = torch.repeat_interleave(num_events_B, output_size=batch.num_events)
    first_B = batch.set_offsets[batch.patient_offsets[:-1]]
    place_E = torch.arange(batch.num_events) - first_B[patient_E]
    noise = PatientNoise.of_step(seed, step, patient_keys(batch.patient_id))
    rate_B = 2 * rate * noise.of_patients().uniform(_PATIENT_SALT)
    keep_E = noise.at(patient_E, place_E).uniform(_EVENT_SALT) >= rate_B[patient_E]
    return batch.keep_events(keep_E | (place_E == 0))
