"""The samples of a batch: their names, and where several share a patient's events.

Shape suffixes: B patients, N samples, S sets of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

PredictionTime: TypeAlias = datetime | float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSamples:
    """The samples [N] of a batch of which several share a patient's events: each is the first sets of one.

    Attributes:
        patient: [N] int64, the position of the patient in the batch; all patients occur, in order, each with all its
            sets last.
        num_sets: [N] int64, at least 1.
        label: [N], or of T tasks [N, T], as in :class:`PatientBatch`.
        prediction_time: N times, as there.
    """

    patient: Tensor
    num_sets: Tensor
    label: Tensor
    prediction_time: list[PredictionTime] | None

    @property
    def whole(self) -> Tensor:
        """[B] int64, the sample of each patient that has all its sets."""
        return to_offsets(torch.bincount(self.patient))[1:] - 1

    def between(self, start: int, stop: int) -> BatchSamples:
        """Return the samples of the patients ``start`` … ``stop`` − 1."""
        own = slice(*torch.searchsorted(self.patient, torch.tensor([start, stop])).tolist())
        return BatchSamples(
            patient=self.patient[own] - start,
            num_sets=self.num_sets[own],
            label=self.label[own],
            prediction_time=self.prediction_time and self.prediction_time[own],
        )

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> BatchSamples:
        """Return the samples with changed tensors."""
        patient, num_sets, label = map(change, (self.patient, self.num_sets, self.label))
        return BatchSamples(patient=patient, num_sets=num_sets, label=label, prediction_time=self.prediction_time)

    def keep_sets(self, keep_S: Tensor, patient_offsets: Tensor) -> BatchSamples:
        """Return the samples with those of their sets that are kept, ``keep_S`` [S] bool, of the batch."""
        kept_before, first = to_offsets(keep_S.long()), patient_offsets[self.patient]
        return replace(self, num_sets=kept_before[first + self.num_sets] - kept_before[first])


def sample_keys(patient_id: list[str], prediction_time: list[PredictionTime] | None) -> list[str]:
    """Return the keys of samples; see :attr:`PatientBatch.sample_key`."""
    if prediction_time is None:
        return patient_id
    pairs = zip(patient_id, prediction_time, strict=True)
    return [
        patient if time is None else f"{patient}@{time.isoformat() if isinstance(time, datetime) else time!r}"
        for patient, time in pairs
    ]


def to_offsets(sizes: Tensor) -> Tensor:
    """Return the [N+1] offsets of parts of the given sizes [N]."""
    return F.pad(sizes.cumsum(0), (1, 0))
