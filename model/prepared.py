"""The prepared batch: all that a step needs and that can be known before it.

It is made on the CPU in the prefetch thread, so that the step itself neither waits for the device nor copies piece by
piece.

Shape suffixes: B patients, S sets, R slots of the set layout, V (patient, variable) pairs that occur, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.capacity import BatchShape, fill_batch
from model.events import has_number
from model.features import VariableLayout, summary_features
from model.kernels.ops import SEQUENCE_TILE, TILE
from model.noise import PatientNoise, StepNoise
from model.prefixes import Prefixes, SharedRows
from model.ragged import LayoutRoom, SetLayout
from model.segments import Segments, number_values
from model.sequence import SequenceLayout, time_features
from pipeline.loading.batch import PatientBatch

ALIGNMENT = 16
"""Bytes to which each tensor is aligned in the buffer of a packed batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedBatch:
    """A batch with the layouts, summary features and noise keys of one step.

    Attributes:
        batch: the patients, then fillers.
        num_patients: the patients that are no fillers.
        shape: the capacity that the batch was filled up to; None = it has none.
        sets: the slots of events and sets.
        sequences: the rectangles of the patients' sets.
        variables: the pairs of sample and variable; a sample is a patient, unless there are prefixes.
        shared: what samples have of the patients whose passes they share; None = each patient is a sample.
        codes: [U] int64, the codes that occur.
        slots_of_code, pairs_of_code: the slots and the pairs of each of these.
        slots_of_pair: the slots of each pair; None where samples share passes.
        cell_of_pair: [V] int64, the place of each pair among those of all codes, ``max_pairs`` for each code.
        max_pairs: the most pairs of a code, or of a capacity's.
        slots_of_variable: the slots of each pair in the layout of the variables.
        value: [R] float32, of the event of each slot.
        has_number: [R] bool, whether it counts as a number.
        time: [S, ·] float32, what encodes the minutes of sets.
        features: [V, F] float32, the summary features of each pair, not yet scaled.
        noise: the noise of the step; None = none, for evaluation.
        buffer: [·] uint8, what all tensors are views of; None = not packed.
    """

    batch: PatientBatch
    num_patients: int
    shape: BatchShape | None
    sets: SetLayout
    sequences: SequenceLayout
    variables: VariableLayout
    shared: SharedRows | None
    codes: Tensor
    slots_of_code: Segments
    slots_of_pair: Segments | None
    pairs_of_code: Segments
    cell_of_pair: Tensor
    max_pairs: int
    slots_of_variable: Segments
    value: Tensor
    has_number: Tensor
    time: Tensor
    features: Tensor
    noise: StepNoise | None
    buffer: Tensor | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        batch: PatientBatch,
        *,
        prefixes: Prefixes | None = None,
        seed: int | None = None,
        step: int = 0,
        capacities: Sequence[BatchShape] = (),
    ) -> PreparedBatch:
        """Prepare a batch on the CPU.

        Args:
            batch: on the CPU.
            prefixes: what outcomes are predicted of, which has no capacities; None = the samples of the batch.
            seed: seed of the noise of training step ``step``; None = no noise.
            step: the training step, counted from 0.
            capacities: the shapes among which the batch is given the first that has room for it, by filler patients.
        """
        num_patients, num_sets, prefixes = batch.num_patients, batch.num_sets, prefixes or Prefixes.of(batch)
        batch, shape = (fill_batch(batch, capacities) if capacities and prefixes is None else None) or (batch, None)
        set_room, variable_room, tiles = None, None, 0
        if shape is not None:
            set_room = LayoutRoom(num_sets, shape.longest, shape.num_sets + shape.events // TILE)
            variable_room = LayoutRoom(num_patients, shape.codes, shape.num_patients + shape.pairs // TILE)
            tiles = shape.num_patients + shape.num_sets // SEQUENCE_TILE
        sets = SetLayout.build(batch.set_offsets, set_room)
        sequences = SequenceLayout.build(batch.patient_offsets, tiles)
        samples = batch if prefixes is None else prefixes.separate(batch)
        variables = VariableLayout.build(samples, variable_room)
        event = sets.event_of_slot
        codes, code_of_event = number_values(batch.code)
        code_of_pair = torch.searchsorted(codes, variables.code)
        max_pairs = int(np.bincount(code_of_pair.numpy()).max(initial=0))
        if shape is not None:
            others = np.setdiff1d(np.arange(1, shape.codes + 1), codes.numpy())  # none is padding's
            codes = torch.cat([codes, torch.from_numpy(others[: shape.codes - len(codes)])])
            max_pairs = shape.num_patients
        pairs_of_code = Segments.build(code_of_pair, len(codes))
        patients = None if seed is None else PatientNoise.for_step(batch.sample_key, seed=seed, step=step)
        return cls(
            batch=batch,
            num_patients=num_patients,
            shape=shape,
            sets=sets,
            sequences=sequences,
            variables=variables,
            shared=None if prefixes is None else prefixes.lay_out(batch, sets, variables),
            codes=codes,
            slots_of_code=Segments.build(code_of_event[event], len(codes)),
            slots_of_pair=Segments.build(variables.pair[event]) if prefixes is None else None,
            pairs_of_code=pairs_of_code,
            cell_of_pair=code_of_pair * max_pairs + pairs_of_code.rank_in_segment(),
            max_pairs=max_pairs,
            slots_of_variable=Segments.build(variables.layout.event_of_slot),
            value=batch.value[event],
            has_number=has_number(batch.code[event], batch.has_value[event]),
            time=time_features(batch.minute),
            features=summary_features(samples, variables),
            noise=_draw_noise(patients, sequences, variables, prefixes) if patients else None,
        )

    def pack(self, *, pin: bool) -> PreparedBatch:
        """Return a copy whose tensors are views of one buffer, in page-locked memory if ``pin``."""
        tensors = _tensors(replace(self, buffer=None))
        packed = self.take(torch.empty(sum(map(_aligned_bytes, tensors)), dtype=torch.uint8, pin_memory=pin))
        for tensor, view in zip(tensors, _tensors(packed), strict=False):  # the buffer itself comes last
            view.numpy()[...] = tensor.numpy()  # PyTorch's copy takes longer to begin
        return packed

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PreparedBatch:
        """Return the batch on ``device``, by one copy of the buffer."""
        if self.features.device == torch.device(device):
            return self
        packed = self if self.buffer is not None else self.pack(pin=False)
        assert packed.buffer is not None
        return packed.take(packed.buffer.to(device, non_blocking=non_blocking))

    def take(self, buffer: Tensor) -> PreparedBatch:
        """Return the batch with its tensors as views of ``buffer``, that of a packed batch of the same shapes."""
        unpacked, views, start = replace(self, buffer=None), list[Tensor](), 0
        typed = {dtype: buffer.view(dtype) for dtype in (torch.int64, torch.float32, torch.bool)}
        for tensor in _tensors(unpacked):
            shape = tensor.shape
            strides = (1,) if len(shape) == 1 else (shape[1], 1)
            views.append(typed[tensor.dtype].as_strided(shape, strides, start // tensor.itemsize))
            start += _aligned_bytes(tensor)
        viewed: PreparedBatch = _replace_tensors(unpacked, iter(views))
        object.__setattr__(viewed, "buffer", buffer)
        return viewed


def _draw_noise(
    patients: PatientNoise, sequences: SequenceLayout, variables: VariableLayout, prefixes: Prefixes | None
) -> StepNoise:
    """Return the noise of a step; samples that share a patient have the noise that the patient alone has."""
    of_sets = patients.for_rows(sequences.patient, sequences.position)
    if prefixes is None:
        return StepNoise(patients.for_patients(), of_sets, patients.for_rows(variables.patient, variables.code))
    num_codes = int(variables.code.max()) + 1 if len(variables.code) else 1
    pair, rows = number_values(prefixes.patient[variables.patient] * num_codes + variables.code)
    of_pairs = patients.for_rows(pair // num_codes, pair % num_codes)
    of_samples = patients.for_patients()
    return StepNoise(replace(of_samples, rows=prefixes.patient), of_sets, replace(of_pairs, rows=rows))


class TensorSpec(NamedTuple):
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    itemsize: int
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.itemsize, tensor.nbytes)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A prepared batch as one piece of memory, which a process can send.

    Attributes:
        specs: the batch, with specs for tensors.
        memory: [·] uint8, its buffer.
    """

    specs: PreparedBatch
    memory: npt.NDArray[np.uint8]

    @classmethod
    def send(cls, prepared: PreparedBatch) -> PackedBatch:
        packed = prepared.pack(pin=False)
        assert packed.buffer is not None
        unpacked = replace(packed, buffer=None)
        return cls(_replace_tensors(unpacked, map(TensorSpec.of, _tensors(unpacked))), packed.buffer.numpy())

    def receive(self, *, pin: bool) -> PreparedBatch:
        """Return the batch as :meth:`PreparedBatch.pack` would have."""
        buffer = torch.from_numpy(self.memory)
        return self.specs.take(buffer.pin_memory() if pin else buffer)


def _aligned_bytes(tensor: Tensor | TensorSpec) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _field_names(value: Any) -> Iterable[str]:
    """Return the names of the fields of a dataclass; :func:`dataclasses.fields` would take most of the time here."""
    names: Iterable[str] = getattr(value, "__dataclass_fields__", ())
    return names


def _tensors(value: Any) -> list[Any]:
    """Return the tensors, or specs of them, of nested dataclasses, in the order of their fields."""
    if isinstance(value, Tensor | TensorSpec):
        return [value]
    return [tensor for name in _field_names(value) for tensor in _tensors(getattr(value, name))]


def _replace_tensors(value: Any, tensors: Iterator[Any]) -> Any:
    """Return nested dataclasses with other tensors.

    ``__init__`` is not called: the values were checked when they were made, and on a GPU a check would wait for it.
    """
    if isinstance(value, Tensor | TensorSpec):
        return next(tensors)
    names = _field_names(value)
    if not names:
        return value
    copy = object.__new__(type(value))
    for name in names:
        object.__setattr__(copy, name, _replace_tensors(getattr(value, name), tensors))
    return copy
