"""The batch: ragged twice, flat arrays with offsets; and its padded form.

Shape suffixes: B patients, S sets in all, E events in all, L the most events of one patient,
D the width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientBatch:
    """Some patients, whole, in the order of the plan.

    Attributes:
        code: [E] int64, the variables' codes; never 0, which is padding's.
        value: [E] float32, z-scored; 0 where the event has no number.
        has_value: [E] bool.
        set_offsets: [S+1] int64, the events of set ``s`` are ``set_offsets[s]:set_offsets[s+1]``.
        minute: [S] float32, minutes from the patient's time origin.
        patient_offsets: [B+1] int64, the sets of patient ``b`` are ``patient_offsets[b]:patient_offsets[b+1]``.
        label: [B] int64, -1 where the patient is unlabelled.
        patient_id: B strings.
    """

    code: Tensor
    value: Tensor
    has_value: Tensor
    set_offsets: Tensor
    minute: Tensor
    patient_offsets: Tensor
    label: Tensor
    patient_id: list[str]

    @property
    def num_patients(self) -> int:
        return len(self.patient_id)

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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PatientBatch:
        """The same batch with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PatientBatch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())

    def between(self, start: int, stop: int) -> PatientBatch:
        """The patients ``start`` … ``stop`` − 1 alone, as views where that can be."""
        sets = slice(*self.patient_offsets[[start, stop]].tolist())
        events = slice(*self.set_offsets[[sets.start, sets.stop]].tolist())
        return PatientBatch(
            code=self.code[events],
            value=self.value[events],
            has_value=self.has_value[events],
            set_offsets=self.set_offsets[sets.start : sets.stop + 1] - events.start,
            minute=self.minute[sets],
            patient_offsets=self.patient_offsets[start : stop + 1] - sets.start,
            label=self.label[start:stop],
            patient_id=self.patient_id[start:stop],
        )

    def keep_events(self, keep_E: Tensor) -> PatientBatch:
        """The same patients with some of their events, and the sets that still have any.

        Args:
            keep_E: [E] bool.
        """
        set_E = torch.repeat_interleave(self.set_sizes, output_size=self.num_events)
        patient_S = torch.repeat_interleave(self.sets_per_patient, output_size=self.num_sets)
        size_S = torch.bincount(set_E[keep_E], minlength=self.num_sets)
        keep_S = size_S > 0
        zero = size_S.new_zeros(1)
        return PatientBatch(
            code=self.code[keep_E],
            value=self.value[keep_E],
            has_value=self.has_value[keep_E],
            set_offsets=torch.cat([zero, size_S[keep_S].cumsum(0)]),
            minute=self.minute[keep_S],
            patient_offsets=torch.cat([zero, torch.bincount(patient_S[keep_S], minlength=self.num_patients).cumsum(0)]),
            label=self.label,
            patient_id=self.patient_id,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> PatientBatch:
        names = [field.name for field in fields(self) if field.name != "patient_id"]
        return PatientBatch(**{name: change(getattr(self, name)) for name in names}, patient_id=self.patient_id)

    def to_padded(self, embeddings: Tensor | None = None, *, pad_to: int | None = None) -> dict[str, Tensor]:
        """The rectangular layout: one row a patient, one column an event.

        Args:
            embeddings: [num_codes, D] float32, looked up by code for ``var``; left out, no ``var`` is made.
            pad_to: the number of columns; by default L, the most events of a patient in this batch.

        Returns:
            ``code`` [B,L] int64, ``val`` [B,L,1] float32, ``has_value`` [B,L] bool, ``minute`` [B,L,1] float32,
            ``set_id`` [B,L,1] int64 (0, 1, 2 … within the patient), ``label`` [B] int64, ``padding_mask`` [B,L]
            bool with **True = padding**, and ``var`` [B,L,D] where embeddings are given.  Padded cells are 0.

        Raises:
            ValueError: ``pad_to`` is smaller than L.
        """
        num_events_B = self.events_per_patient
        longest = int(num_events_B.max()) if self.num_patients else 0
        width = longest if pad_to is None else pad_to
        if width < longest:
            raise ValueError(f"pad_to={pad_to} is less than the {longest} events of a patient in this batch")
        device = self.code.device
        filled_BL = torch.arange(width, device=device) < num_events_B[:, None]
        set_E = torch.repeat_interleave(self.set_sizes, output_size=self.num_events)
        first_set_S = torch.repeat_interleave(
            self.patient_offsets[:-1], self.sets_per_patient, output_size=self.num_sets
        )
        set_id_S = torch.arange(self.num_sets, device=device) - first_set_S

        # Scattering fills row by row, which is the order of the flat arrays; assigning by mask is five times slower.
        def rectangle(flat_E: Tensor) -> Tensor:
            return flat_E.new_zeros(filled_BL.shape).masked_scatter_(filled_BL, flat_E)

        padded = {
            "code": rectangle(self.code),
            "val": rectangle(self.value).unsqueeze(-1),
            "has_value": rectangle(self.has_value),
            "minute": rectangle(self.minute.index_select(0, set_E)).unsqueeze(-1),
            "set_id": rectangle(set_id_S.index_select(0, set_E)).unsqueeze(-1),
            "label": self.label,
            "padding_mask": ~filled_BL,
        }
        if embeddings is not None:
            padded["var"] = embeddings[padded["code"]].masked_fill(~filled_BL[..., None], 0.0)
        return padded

    @classmethod
    def from_padded(cls, padded: dict[str, Tensor], patient_id: list[str]) -> PatientBatch:
        """The ragged batch of a padded one, whatever its amount of padding; the inverse of :meth:`to_padded`.

        A set is a run of equal ``set_id`` in a row; ``var`` is not read, codes say the same.
        """
        filled_BL = ~padded["padding_mask"]
        set_id_BL = padded["set_id"].squeeze(-1)
        row_E = torch.nonzero(filled_BL)[:, 0]
        set_id_E = set_id_BL[filled_BL]
        starts_E = torch.ones_like(row_E, dtype=torch.bool)
        starts_E[1:] = (row_E[1:] != row_E[:-1]) | (set_id_E[1:] != set_id_E[:-1])
        start_S = torch.nonzero(starts_E)[:, 0]
        num_sets_B = torch.bincount(row_E[start_S], minlength=filled_BL.shape[0])
        zero = start_S.new_zeros(1)
        return cls(
            code=padded["code"][filled_BL],
            value=padded["val"].squeeze(-1)[filled_BL],
            has_value=padded["has_value"][filled_BL],
            set_offsets=torch.cat([start_S, zero + row_E.shape[0]]),
            minute=padded["minute"].squeeze(-1)[filled_BL][start_S],
            patient_offsets=torch.cat([zero, num_sets_B.cumsum(0)]),
            label=padded["label"],
            patient_id=patient_id,
        )
