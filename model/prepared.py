"""The prepared batch: all that a step needs and that can be known before it.

It is made on the CPU in the prefetch thread, so that the step itself neither waits for the device nor copies piece by
piece.

Shape suffixes: B patients, S sets, R slots of the set layout, V (patient, variable) pairs that occur, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.events import has_number
from model.features import VariableLayout, summary_features
from model.noise import PatientNoise, StepNoise
from model.ragged import SetLayout
from model.segments import Segments, number_values
from model.sequence import SequenceLayout, time_features
from pipeline.loading.batch import PatientBatch

ALIGNMENT = 16
"""Bytes to which each tensor is aligned in the buffer of a packed batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedBatch:
    """A batch with the layouts, summary features and noise keys of one step.

    Attributes:
        batch: the patients.
        sets: the slots of events and sets.
        sequences: the rectangles of the patients' sets.
        variables: the pairs of patient and variable.
        codes: [U] int64, the codes that occur.
        slots_of_code, pairs_of_code: the slots and the pairs of each of these.
        slots_of_pair: the slots of each pair.
        slots_of_variable: the slots of each pair in the layout of the variables.
        value: [R] float32, of the event of each slot.
        has_number: [R] bool, whether it counts as a number.
        time: [S, ·] float32, what encodes the minutes of sets.
        features: [V, F] float32, the summary features of each pair, not yet scaled.
        noise: the noise of the step; None = none, for evaluation.
        buffer: [·] uint8, what all tensors are views of; None = not packed.
    """

    batch: PatientBatch
    sets: SetLayout
    sequences: SequenceLayout
    variables: VariableLayout
    codes: Tensor
    slots_of_code: Segments
    slots_of_pair: Segments
    pairs_of_code: Segments
    slots_of_variable: Segments
    value: Tensor
    has_number: Tensor
    time: Tensor
    features: Tensor
    noise: StepNoise | None
    buffer: Tensor | None = field(default=None, repr=False)

    @classmethod
    def build(cls, batch: PatientBatch, *, seed: int | None = None, step: int = 0) -> PreparedBatch:
        """Prepare a batch on the CPU.

        Args:
            batch: on the CPU.
            seed: seed of the noise of training step ``step``; None = no noise.
            step: the training step, counted from 0.
        """
        sequences, variables = SequenceLayout.build(batch.patient_offsets), VariableLayout.build(batch)
        sets, noise = SetLayout.build(batch.set_offsets), None
        event = sets.event_of_slot
        pair_of_slot = variables.pair[event]
        codes, code_of_pair = number_values(variables.code)
        if seed is not None:
            patients = PatientNoise.for_step(batch.sample_key, seed=seed, step=step)
            noise = StepNoise(
                patients.for_patients(),
                patients.for_rows(sequences.patient, sequences.position),
                patients.for_rows(variables.patient, variables.code),
            )
        return cls(
            batch=batch,
            sets=sets,
            sequences=sequences,
            variables=variables,
            codes=codes,
            slots_of_code=Segments.build(code_of_pair[pair_of_slot]),
            slots_of_pair=Segments.build(pair_of_slot),
            pairs_of_code=Segments.build(code_of_pair),
            slots_of_variable=Segments.build(variables.layout.event_of_slot),
            value=batch.value[event],
            has_number=has_number(batch.code[event], batch.has_value[event]),
            time=time_features(batch.minute),
            features=summary_features(batch, variables),
            noise=noise,
        )

    def pack(self, *, pin: bool) -> PreparedBatch:
        """Return a copy whose tensors are views of one buffer, in page-locked memory if ``pin``."""
        unpacked = replace(self, buffer=None)
        num_bytes = sum(map(_aligned_bytes, _tensors(unpacked)))
        packed = unpacked._view(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin))
        for tensor, view in zip(_tensors(unpacked), _tensors(packed), strict=False):  # the buffer itself comes last
            view.copy_(tensor)
        return packed

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PreparedBatch:
        """Return the batch on ``device``, by one copy of the buffer."""
        if self.features.device == torch.device(device):
            return self
        packed = self if self.buffer is not None else self.pack(pin=False)
        assert packed.buffer is not None
        return replace(packed, buffer=None)._view(packed.buffer.to(device, non_blocking=non_blocking))

    def _view(self, buffer: Tensor) -> PreparedBatch:
        """Return the batch with its tensors as views of ``buffer``, one after another."""
        views, start = [], 0
        for tensor in _tensors(self):
            views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += _aligned_bytes(tensor)
        viewed: PreparedBatch = _replace_tensors(self, iter(views))
        return replace(viewed, buffer=buffer)


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors of nested dataclasses, in the order of their fields."""
    if isinstance(value, Tensor):
        return [value]
    return [t for f in fields(value) for t in _tensors(getattr(value, f.name))] if is_dataclass(value) else []


def _replace_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return nested dataclasses with other tensors.

    ``__init__`` is not called: the values were checked when they were made, and on a GPU a check would wait for it.
    """
    if isinstance(value, Tensor):
        return next(tensors)
    if not is_dataclass(value):
        return value
    copy = object.__new__(type(value))
    for f in fields(value):
        object.__setattr__(copy, f.name, _replace_tensors(getattr(value, f.name), tensors))
    return copy
