"""Summary features: a few numbers for each variable of a patient, such as a tree would be given.

Attention pools events softly; a minimum, a last value or a number of values is hard to express that way, and easy to
count.

Shape suffixes: S sets, E events, V (patient, variable) pairs that occur, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.events import has_number
from model.ragged import LayoutRoom, SetLayout
from model.segments import Segments, number_values
from pipeline.arrays import offsets_from_sizes
from pipeline.loading.batch import PatientBatch

NUM_FEATURES = 11

RECENT_MINUTES = 12 * 60
"""Time constant of the mean of recent values: a value this much older than the last one weighs 1/e."""


@dataclass(frozen=True, slots=True)
class VariableLayout:
    """The variables that occur in each patient.

    Attributes:
        pair: [E] int64, the pair of patient and variable of each event.
        patient, code: [V] int64, of each pair; pairs are sorted by patient, then by code.
        offsets: [B+1] int64, the first pair of each patient.
        layout: the slots of the pairs, the variables of a patient as one set.
    """

    pair: Tensor
    patient: Tensor
    code: Tensor
    offsets: Tensor
    layout: SetLayout

    @property
    def num_patients(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def pairs_of_patient(self) -> Segments:
        return Segments(self.patient, self.offsets)

    @classmethod
    def build(cls, batch: PatientBatch, room: LayoutRoom | None = None) -> VariableLayout:
        """Lay out the variables of a batch on the CPU: the number of pairs decides shapes, unless ``room`` does."""
        patient_S = torch.repeat_interleave(torch.arange(batch.num_patients), batch.sets_per_patient)
        patient_E = torch.repeat_interleave(patient_S, batch.set_sizes)
        num_codes = int(batch.code.max()) + 1 if batch.num_events else 1
        key, pair_E = number_values(patient_E * num_codes + batch.code)
        patient = key // num_codes
        counts = np.bincount(patient.numpy(), minlength=batch.num_patients)
        offsets = torch.from_numpy(offsets_from_sizes(counts))
        return cls(pair_E, patient, key % num_codes, offsets, SetLayout.build(offsets, room))


def summary_features(batch: PatientBatch, variables: VariableLayout) -> Tensor:
    """Return [V, F] float32, the summary features of each pair of patient and variable.

    Of the values: mean, standard deviation, minimum, maximum, first and last (the mean within the first and the last
    set that has a value), mean of the recent ones, and whether there are any.  Of the events: their number, and the
    hours from the first and from the last of them to the last set of the patient.  Values go through asinh, counts and
    hours through log(1 + x), so that all are of similar size.
    """
    pair_E, minute_S = variables.pair, batch.minute
    set_E = torch.repeat_interleave(batch.set_sizes, output_size=batch.num_events)
    end_V = minute_S[batch.patient_offsets[1:] - 1][variables.patient]
    number_E = has_number(batch.code, batch.has_value)

    def total(amount_E: Tensor) -> Tensor:
        return torch.zeros_like(end_V).index_add(0, pair_E, amount_E)

    def extreme(amount_E: Tensor, reduce: str, fill: float | int) -> Tensor:
        """Reduce over the events of each pair that have a number; 0 for a pair without any."""
        amount_E = torch.where(number_E, amount_E, fill)
        reduced = amount_E.new_full(end_V.shape, fill).scatter_reduce(0, pair_E, amount_E, reduce)
        return reduced.masked_fill(reduced == fill, 0)

    weight_E = number_E.float()
    x_E = batch.value.float().asinh() * weight_E
    count_V = total(weight_E)
    divisor_V = count_V.clamp_min(1)
    mean_V = total(x_E) / divisor_V
    std_V = (total((x_E - mean_V[pair_E]).square() * weight_E) / divisor_V).sqrt()
    features = [mean_V, std_V, extreme(x_E, "amin", torch.inf), extreme(x_E, "amax", -torch.inf)]
    for reduce, outside in (("amin", minute_S.shape[0]), ("amax", -1)):
        set_V = extreme(set_E, reduce, outside)
        inside_E = weight_E * (set_E == set_V[pair_E])
        features.append(total(x_E * inside_E) / total(inside_E).clamp_min(1))
    minute_E = minute_S[set_E]
    # Age is counted from the variable's own last value: counted from the patient's last set, all weights could be 0.
    newest_V = extreme(minute_E, "amax", -torch.inf)
    recent_E = ((minute_E - newest_V[pair_E]) / RECENT_MINUTES).clamp(max=0).exp() * weight_E
    features.append(total(x_E * recent_E) / total(recent_E).clamp_min(1))  # the last value weighs 1
    features += [(count_V > 0).float(), total(torch.ones_like(x_E)).log1p()]
    for reduce, fill in (("amin", torch.inf), ("amax", -torch.inf)):
        at_V = torch.full_like(end_V, fill).scatter_reduce(0, pair_E, minute_E, reduce)
        features.append(((end_V - at_V) / 60).log1p())
    return torch.stack(features, dim=1)
