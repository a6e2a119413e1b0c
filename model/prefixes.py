"""One pass, many prediction times: samples that share the encoder and the transformer.

What the encoder and the causal transformer make of a set does not depend on later sets.  So samples of a patient whose
windows begin at the same event share what is made of their sets, and only the outcome head runs for each of them.

Shape suffixes: B patients of the batch, N samples, S sets and E events of the batch, R its slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.features import VariableLayout
from model.ragged import SetLayout
from model.segments import SegmentPrefixes, Segments
from pipeline.arrays import concatenate_ranges, offsets_from_sizes
from pipeline.loading.batch import PatientBatch


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Samples of which each is the first sets of a patient of the batch, in any order.

    Attributes:
        patient: [N] int64, the patient of each, as its position in the batch.
        num_sets: [N] int64, how many of the patient's sets it has: at least 1.
    """

    patient: Tensor
    num_sets: Tensor

    @classmethod
    def of(cls, batch: PatientBatch) -> Prefixes | None:
        """Return the samples of a batch that share events; None = each patient is a sample."""
        samples = batch.samples
        return None if samples is None else cls(samples.patient, samples.num_sets)

    @classmethod
    def after_hours(cls, batch: PatientBatch, hours: tuple[float, ...]) -> Prefixes:
        """Return the samples of a batch [N], then what each patient was so many hours after its first set.

        A prefix ends before the first set that is later; there are B of each of the ``hours``, one after another.
        """
        first_S = batch.patient_offsets[:-1][batch.patient_of_set]
        minute_S, patients = batch.minute - batch.minute[first_S], torch.arange(batch.num_patients)
        whole = cls.of(batch) or cls(patients, batch.sets_per_patient)
        counts = [whole.num_sets]
        for limit in hours:
            is_later_S = (minute_S > 60 * limit).long()
            later_before_S = is_later_S.cumsum(0)
            is_early_S = later_before_S == (later_before_S - is_later_S)[first_S]
            counts.append(torch.bincount(batch.patient_of_set[is_early_S], minlength=batch.num_patients))
        return cls(torch.cat([whole.patient, patients.repeat(len(hours))]), torch.cat(counts))

    def separate(self, batch: PatientBatch) -> PatientBatch:
        """Return the samples as a batch of N patients, each with sets and events of its own."""
        sets, events = self._sets(batch), self._events(batch)
        sizes = batch.set_sizes.numpy()[sets]
        chosen, times = self.patient.tolist(), batch.prediction_time
        return replace(
            batch,
            code=batch.code[events],
            value=batch.value[events],
            has_value=batch.has_value[events],
            set_offsets=torch.from_numpy(offsets_from_sizes(sizes)),
            minute=batch.minute[sets],
            patient_offsets=torch.from_numpy(offsets_from_sizes(self.num_sets.numpy())),
            label=batch.label[self.patient],
            patient_id=[batch.patient_id[number] for number in chosen],
            prediction_time=times and [times[number] for number in chosen],
            samples=None,
        )

    def lay_out(self, batch: PatientBatch, sets: SetLayout, variables: VariableLayout) -> SharedRows:
        """Return where the head finds what samples begin with.

        Args:
            batch: the patients.
            sets: the slots of the batch.
            variables: the pairs of sample and variable, of :meth:`separate`.
        """
        slot_of_event = torch.empty(batch.num_events, dtype=torch.int64)
        slots = torch.arange(sets.num_slots)[sets.mask]
        slot_of_event[sets.event_of_slot[slots]] = slots
        whole = VariableLayout.build(batch)
        events = Segments.build(whole.pair, len(whole.code))
        assert events.order is not None
        num_codes = int(whole.code.max()) + 1 if len(whole.code) else 1
        keys = (
            patient * num_codes + code
            for patient, code in ((whole.patient, whole.code), (self.patient[variables.patient], variables.code))
        )
        first_V = events.offsets[torch.searchsorted(*keys)]
        num_events_V = torch.bincount(variables.pair, minlength=len(first_V))
        last_set = batch.patient_offsets[self.patient] + self.num_sets - 1
        return SharedRows(
            events=SegmentPrefixes(
                rows=slot_of_event[events.order],
                rank=events.rank_in_segment()[events.order],
                longest=int(events.offsets.diff().max()) if len(whole.code) else 0,
                ends=Segments.build(first_V + num_events_V - 1, batch.num_events),
            ),
            sets=SegmentPrefixes(
                rows=None,
                rank=torch.arange(batch.num_sets) - batch.patient_offsets[:-1][batch.patient_of_set],
                longest=int(batch.sets_per_patient.max()) if batch.num_patients else 0,
                ends=Segments.build(last_set, batch.num_sets),
            ),
        )

    def _sets(self, batch: PatientBatch) -> np.ndarray:
        return concatenate_ranges(batch.patient_offsets[self.patient].numpy(), self.num_sets.numpy())

    def _events(self, batch: PatientBatch) -> np.ndarray:
        first = batch.patient_offsets[self.patient]
        start = batch.set_offsets[first].numpy()
        return concatenate_ranges(start, batch.set_offsets[first + self.num_sets].numpy() - start)


@dataclass(frozen=True, slots=True)
class SharedRows:
    """What samples have of the patients that they share.

    Attributes:
        events: the slots of each pair of patient and variable, and those that each pair of sample and variable has.
        sets: the sets of each patient, and those that each sample has.
    """

    events: SegmentPrefixes
    sets: SegmentPrefixes
