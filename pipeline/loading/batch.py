"""The batch: ragged twice, flat arrays with offsets; and its padded form.

A sample is a whole patient, or a patient's events up to a prediction time; several samples of a batch may be of one
patient, and in what follows each counts as a patient of its own.

Shape suffixes: B patients, S sets in all, E events in all, L the maximum number of events of a patient,
D the width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.loading.samples import BatchSamples, PredictionTime, sample_keys, to_offsets

_DTYPES = {
    "code": torch.int64, "value": torch.float32, "has_value": torch.bool, "set_offsets": torch.int64,
    "minute": torch.float32, "patient_offsets": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PatientBatch:
    """Some samples in the order of the plan.

    Examples:
        Two patients; the first has one event, the second a set of two events and a set of one:

        >>> batch = PatientBatch(
        ...     code=torch.tensor([5, 3, 4, 5]),
        ...     value=torch.tensor([0.5, 0.0, 1.5, -1.0]),
        ...     has_value=torch.tensor([True, False, True, True]),
        ...     set_offsets=torch.tensor([0, 1, 3, 4]),
        ...     minute=torch.tensor([-2.0, 0.0, 7.0]),
        ...     patient_offsets=torch.tensor([0, 1, 3]),
        ...     label=torch.tensor([1, -1]),
        ...     patient_id=["a", "b"],
        ... )
        >>> batch.set_sizes.tolist(), batch.sets_per_patient.tolist(), batch.events_per_patient.tolist()
        ([1, 2, 1], [1, 2], [1, 3])
        >>> batch.patient_of_set.tolist(), batch.set_of_event.tolist()
        ([0, 1, 1], [0, 1, 1, 2])
        >>> batch.to_padded()["code"].tolist()
        [[5, 0, 0], [3, 4, 5]]

        Dtypes, shapes and, on the CPU, the ends of the offsets are checked.

        >>> PatientBatch.from_padded(batch.to_padded(), ["a", "b", "c"])
        Traceback (most recent call last):
        ValueError: patient_offsets is torch.int64 [3], but 3 patients with 3 sets and 4 events need torch.int64 [4]

    Attributes:
        code: [E] int64, the variables' codes; never 0, which is padding's.
        value: [E] float32, z-scored; 0 where the event has no number.
        has_value: [E] bool.
        set_offsets: [S+1] int64, the events of set ``s`` are ``set_offsets[s]:set_offsets[s+1]``.
        minute: [S] float32, minutes from the patient's time origin.
        patient_offsets: [B+1] int64, the sets of patient ``b`` are ``patient_offsets[b]:patient_offsets[b+1]``.
        label: [B] int64, -1 where the patient is unlabelled.  Of a regression, and soft (the probability of a
            positive label), [B] float32, NaN where unlabelled; of T tasks [B, T] float32, of which each column is
            either, NaN where unlabelled.
        patient_id: B strings.
        prediction_time: B times: dates (UTC), or minutes from the patient's time origin; None = the whole patient.  In
            place of a list, None says so of all.
        samples: what outcomes are predicted of, where several share a patient's events, of which ``label`` and
            ``prediction_time`` are those of the longest; None = each patient is a sample.
    """

    code: Tensor
    value: Tensor
    has_value: Tensor
    set_offsets: Tensor
    minute: Tensor
    patient_offsets: Tensor
    label: Tensor
    patient_id: list[str]
    prediction_time: list[PredictionTime] | None = None
    samples: BatchSamples | None = None

    def __post_init__(self) -> None:
        events, sets, patients = self.code.numel(), self.minute.numel(), self.num_patients
        sizes = (events, events, events, sets + 1, sets, patients + 1)
        for (name, dtype), size in zip(_DTYPES.items(), sizes, strict=True):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != (size,):
                need = f"{patients} patients with {sets} sets and {events} events need {dtype} [{size}]"
                raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, but {need}")
        many, kinds = self.label.ndim > 1, (torch.int64, torch.float32)
        if self.label.dtype not in kinds[many:] or self.label.shape[0] != patients or self.label.ndim > 2:
            found = f"label is {self.label.dtype} {[*self.label.shape]}, but {patients} patients"
            raise ValueError(f"{found} need int64 or float32 [{patients}], or float32 [{patients}, tasks]")
        if self.prediction_time is not None and len(self.prediction_time) != patients:
            raise ValueError(f"prediction_time has {len(self.prediction_time)} items for {patients} patients")
        if self.code.is_cpu:  # a device would have to be waited for
            _check_ends("set_offsets", self.set_offsets, events)
            _check_ends("patient_offsets", self.patient_offsets, sets)

    @classmethod
    def unchecked(cls, **attributes: Any) -> PatientBatch:
        """Return a batch of attributes that are known to be right, without checking them."""
        batch = object.__new__(cls)
        batch.__dict__.update(attributes)
        return batch

    @property
    def num_patients(self) -> int:
        return len(self.patient_id)

    @property
    def sample_key(self) -> list[str]:
        """B strings that tell samples apart, also those of one patient; a whole patient's is its id."""
        return sample_keys(self.patient_id, self.prediction_time)

    @property
    def num_samples(self) -> int:
        return self.num_patients if self.samples is None else len(self.samples.label)

    @property
    def whole_samples(self) -> Tensor:
        """[B] int64, the sample of each patient that has all its sets."""
        return torch.arange(self.num_patients) if self.samples is None else self.samples.whole

    @property
    def sample_label(self) -> Tensor:
        """[N] the labels of the samples, or of T tasks [N, T]."""
        return self.label if self.samples is None else self.samples.label

    @property
    def sample_names(self) -> tuple[list[str], list[PredictionTime] | None]:
        """The patients of the N samples, and their prediction times."""
        if self.samples is None:
            return self.patient_id, self.prediction_time
        return [self.patient_id[number] for number in self.samples.patient.tolist()], self.samples.prediction_time

    @property
    def num_sets(self) -> int:
        return self.minute.shape[0]

    @property
    def num_events(self) -> int:
        return self.code.shape[0]

    @property
    def set_sizes(self) -> Tensor:
        """[S] int64, events of each set."""
        return self.set_offsets.diff()

    @property
    def sets_per_patient(self) -> Tensor:
        """[B] int64, sets of each patient."""
        return self.patient_offsets.diff()

    @property
    def events_per_patient(self) -> Tensor:
        """[B] int64, events of each patient."""
        return self.set_offsets[self.patient_offsets].diff()

    @cached_property
    def patient_of_set(self) -> Tensor:
        """[S] int64, the patient of each set; computed once, and moved with the batch."""
        return torch.repeat_interleave(self.sets_per_patient, output_size=self.num_sets)

    @cached_property
    def set_of_event(self) -> Tensor:
        """[E] int64, the set of each event; computed once, and moved with the batch."""
        return torch.repeat_interleave(self.set_sizes, output_size=self.num_events)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PatientBatch:
        """Return the same batch with every tensor on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PatientBatch:
        """Return the same batch in page-locked memory, from which a GPU copies while it computes."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> PatientBatch:
        values = dict(self.__dict__)  # with the derived tensors that are there
        values["samples"] = self.samples and self.samples.map_tensors(change)
        return PatientBatch.unchecked(**{n: change(x) if isinstance(x, Tensor) else x for n, x in values.items()})

    def __reduce__(self) -> tuple[Callable[..., PatientBatch], tuple[dict[str, Any]]]:
        """Let pickle send the tensors as NumPy arrays, a tenth of the work of PyTorch's own way."""
        return _restore, ({n: x.numpy() if isinstance(x, Tensor) else x for n, x in self.__dict__.items()},)

    def between(self, start: int, stop: int) -> PatientBatch:
        """Return the patients ``start`` … ``stop`` − 1 alone, as views where possible."""
        sets = slice(*self.patient_offsets[[start, stop]].tolist())
        events = slice(*self.set_offsets[[sets.start, sets.stop]].tolist())
        return self._with_events(
            events,
            set_offsets=self.set_offsets[sets.start : sets.stop + 1] - events.start,
            minute=self.minute[sets],
            patient_offsets=self.patient_offsets[start : stop + 1] - sets.start,
            label=self.label[start:stop],
            patient_id=self.patient_id[start:stop],
            prediction_time=self.prediction_time and self.prediction_time[start:stop],
            samples=self.samples and self.samples.between(start, stop),
        )

    def keep_events(self, keep_E: Tensor) -> PatientBatch:
        """Return the same patients with some of their events, ``keep_E`` [E] bool, and the sets that still have any."""
        size_S = torch.bincount(self.set_of_event[keep_E], minlength=self.num_sets)
        keep_S = size_S > 0
        num_sets_B = torch.bincount(self.patient_of_set[keep_S], minlength=self.num_patients)
        offsets = {"set_offsets": to_offsets(size_S[keep_S]), "patient_offsets": to_offsets(num_sets_B)}
        samples = self.samples and self.samples.keep_sets(keep_S, self.patient_offsets)
        return self._with_events(keep_E, minute=self.minute[keep_S], samples=samples, **offsets)

    def _with_events(self, events: slice | Tensor, **others: Any) -> PatientBatch:
        return replace(self, **{name: getattr(self, name)[events] for name in ("code", "value", "has_value")}, **others)

    def to_padded(self, embeddings: Tensor | None = None, *, pad_to: int | None = None) -> dict[str, Tensor]:
        """Return the rectangular layout: one row a patient, one column an event; padded cells are 0.

        Args:
            embeddings: [num_codes, D] float32, looked up by code for ``var``; without it, no ``var`` is made.
            pad_to: the number of columns; by default L, the maximum number of events of a patient in this batch.

        Returns:
            ``code`` [B,L] int64, ``val`` [B,L,1] float32, ``has_value`` [B,L] bool, ``minute`` [B,L,1] float32,
            ``set_id`` [B,L,1] int64 (0, 1, 2 … within the patient), ``label`` as it is, ``padding_mask`` [B,L]
            bool with **True = padding**, and ``var`` [B,L,D] with embeddings.
        """
        num_events_B = self.events_per_patient
        longest = int(num_events_B.max()) if self.num_patients else 0
        width = longest if pad_to is None else pad_to
        if width < longest:
            raise ValueError(f"pad_to={pad_to} is less than the {longest} events of a patient in this batch")
        filled_BL = torch.arange(width, device=self.code.device) < num_events_B[:, None]
        set_id_S = torch.arange(self.num_sets, device=self.code.device) - self.patient_offsets[self.patient_of_set]

        # Scattering fills row by row, which is the order of the flat arrays; assigning by mask is five times slower.
        def fill(flat_E: Tensor) -> Tensor:
            return flat_E.new_zeros(filled_BL.shape).masked_scatter_(filled_BL, flat_E)

        padded = {
            "code": fill(self.code),
            "val": fill(self.value).unsqueeze(-1),
            "has_value": fill(self.has_value),
            "minute": fill(self.minute.index_select(0, self.set_of_event)).unsqueeze(-1),
            "set_id": fill(set_id_S.index_select(0, self.set_of_event)).unsqueeze(-1),
            "label": self.label,
            "padding_mask": ~filled_BL,
        }
        if embeddings is not None:
            padded["var"] = embeddings[padded["code"]].masked_fill(~filled_BL[..., None], 0.0)
        return padded

    @classmethod
    def from_padded(
        cls, padded: dict[str, Tensor], patient_id: list[str], prediction_time: list[PredictionTime] | None = None
    ) -> PatientBatch:
        """Return the ragged batch of a padded one, whatever its amount of padding; the inverse of :meth:`to_padded`.

        A set is a run of equal ``set_id`` in a row; ``var`` is not read, codes say the same.
        """
        filled_BL = ~padded["padding_mask"]
        row_E = torch.nonzero(filled_BL)[:, 0]
        set_id_E = padded["set_id"].squeeze(-1)[filled_BL]
        starts_E = torch.ones_like(row_E, dtype=torch.bool)
        starts_E[1:] = (row_E.diff() != 0) | (set_id_E.diff() != 0)
        start_S = torch.nonzero(starts_E)[:, 0]
        num_sets_B = torch.bincount(row_E[start_S], minlength=filled_BL.shape[0])
        return cls(
            code=padded["code"][filled_BL],
            value=padded["val"].squeeze(-1)[filled_BL],
            has_value=padded["has_value"][filled_BL],
            set_offsets=F.pad(start_S, (0, 1), value=row_E.shape[0]),
            minute=padded["minute"].squeeze(-1)[filled_BL][start_S],
            patient_offsets=to_offsets(num_sets_B),
            label=padded["label"],
            patient_id=patient_id,
            prediction_time=prediction_time,
        )


def _restore(values: dict[str, Any]) -> PatientBatch:
    tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in values.items()}
    return PatientBatch.unchecked(**tensors)


def _check_ends(name: str, offsets: Tensor, stop: int) -> None:
    ends = [int(offsets[0]), int(offsets[-1])]
    if ends != [0, stop]:
        raise ValueError(f"{name} must begin at 0 and end at {stop}, not at {ends[0]} and {ends[1]}")
