"""Batches of equal shapes, so that one captured CUDA graph replays the step of many of them.

A step's shapes are a few numbers: of events, sets, patients, variables.  A *capacity* has room for any batch whose
numbers are not greater; the rest of the room is taken by *filler patients*, whose sets no loss counts and whom no other
patient attends to, so they weigh nothing in losses and gradients (docs/model.md).  No two batches of intensive-care
stays have the same numbers, but they rise and fall together: 16 capacities are enough for 98 % of the batches of a run.

Shape suffixes: B patients, S sets, E events.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.arrays import Ints, concatenate_ranges
from pipeline.loading.batch import PatientBatch
from pipeline.schema import UNLABELLED

MAX_CAPACITIES = 16
"""Graphs that are captured at most; each holds its own inputs on the device."""

STEPS_PER_OCTAVE = 8
"""Capacities are rounded up to so many sizes per doubling."""

SLACK = 1.1
"""Room beyond the greatest numbers of the batches that a capacity is fitted to."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class BatchShape:
    """The numbers of a batch, or of a capacity, that decide the shapes of a step.

    Attributes:
        events: E.
        single_sets, sets: sets of one event, and of several.
        single_patients, patients: patients of one variable, and of several.
        pairs: of patient and variable.
        codes: that occur.
        longest: most events of a set.
    """

    events: int
    single_sets: int
    sets: int
    single_patients: int
    patients: int
    pairs: int
    codes: int
    longest: int

    @classmethod
    def of(cls, batch: PatientBatch) -> BatchShape:
        """Return the numbers of a batch on the CPU."""
        code, sizes = batch.code.numpy(), batch.set_sizes.numpy()
        patient_E = np.repeat(np.arange(batch.num_patients), batch.events_per_patient.numpy())
        bound = int(code.max(initial=0)) + 1
        pairs_B = np.bincount(np.unique(patient_E * bound + code) // bound, minlength=batch.num_patients)
        return cls(
            events=len(code),
            single_sets=int(np.count_nonzero(sizes == 1)),
            sets=int(np.count_nonzero(sizes > 1)),
            single_patients=int(np.count_nonzero(pairs_B == 1)),
            patients=int(np.count_nonzero(pairs_B > 1)),
            pairs=int(pairs_B.sum()),
            codes=len(np.unique(code)),
            longest=int(sizes.max(initial=0)),
        )

    @property
    def num_sets(self) -> int:
        return self.single_sets + self.sets

    @property
    def num_patients(self) -> int:
        return self.single_patients + self.patients

    def minus(self, other: BatchShape) -> BatchShape:
        """Return what is left of each number."""
        return BatchShape(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in dataclasses.fields(self)})


def fill_batch(batch: PatientBatch, capacities: Iterable[BatchShape]) -> tuple[PatientBatch, BatchShape] | None:
    """Return ``batch`` with filler patients behind its own, and the first capacity that it then fills exactly.

    The result is None where no capacity has room.  Codes and the longest set are filled up when the batch is prepared.
    """
    own, codes = BatchShape.of(batch), np.unique(batch.code.numpy())
    for capacity in capacities:
        fillers = _make_fillers(capacity, capacity.minus(own), codes)
        if fillers is not None:
            return _append(batch, *fillers), capacity
    return None


def _make_fillers(capacity: BatchShape, room: BatchShape, codes: Ints) -> tuple[Ints, Ints, Ints] | None:
    """Return the codes of filler events, the sizes of filler sets and the numbers of sets of filler patients that take
    all of ``room``; None where nothing does.
    """
    if min(dataclasses.astuple(room)) < 0 or not (room.sets and room.patients):
        return None
    sizes = np.append(_spread(room.events - room.single_sets, room.sets), np.ones(room.single_sets, np.int64))
    ones = np.ones(room.single_patients, np.int64)
    pairs = np.append(_spread(room.pairs - room.single_patients, room.patients), ones)
    if not (sizes[room.sets - 1] > 1 and sizes[0] <= capacity.longest):
        return None
    if not (pairs[room.patients - 1] > 1 and pairs[0] <= len(codes) and len(pairs) <= len(sizes)):
        return None
    patient = np.arange(len(sizes)) % len(pairs)  # sets are dealt to patients in turns
    order = np.argsort(patient, kind="stable")
    num_events = np.bincount(patient, sizes).astype(np.int64)
    if (num_events < pairs).any():
        return None
    position = concatenate_ranges(np.zeros_like(num_events), num_events)
    return codes[position % np.repeat(pairs, num_events)], sizes[order], np.bincount(patient)


def _spread(total: int, parts: int) -> Ints:
    """Return ``parts`` numbers, as equal as can be, the greater ones first, whose sum is ``total``."""
    numbers = np.full(parts, total // parts)
    numbers[: total % parts] += 1
    return numbers


def _append(batch: PatientBatch, code: Ints, set_sizes: Ints, num_sets: Ints) -> PatientBatch:
    """Return a batch with more patients: events without numbers, without labels or names, all at minute 0."""

    def join(old: torch.Tensor, new: Ints | int, size: int) -> torch.Tensor:
        return torch.cat([old, torch.from_numpy(np.broadcast_to(new, size).copy()).to(old.dtype)])

    none = math.nan if batch.label.is_floating_point() else UNLABELLED
    return PatientBatch(
        code=join(batch.code, code, len(code)),
        value=join(batch.value, 0, len(code)),
        has_value=join(batch.has_value, 0, len(code)),
        set_offsets=join(batch.set_offsets, len(batch.code) + set_sizes.cumsum(), len(set_sizes)),
        minute=join(batch.minute, 0, len(set_sizes)),
        patient_offsets=join(batch.patient_offsets, batch.num_sets + num_sets.cumsum(), len(num_sets)),
        label=torch.cat([batch.label, torch.full((len(num_sets), *batch.label.shape[1:]), none).to(batch.label.dtype)]),
        patient_id=[*batch.patient_id, *[""] * len(num_sets)],
    )


def fit_capacities(shapes: Sequence[BatchShape], *, num_codes: int) -> tuple[BatchShape, ...]:
    """Return at most ``MAX_CAPACITIES`` capacities, the smallest first, for batches like those of ``shapes``.

    Batches are sorted by their events and cut into groups of equal numbers of batches; each has a capacity with room
    for the greatest number of everything in it, and a little more.
    """
    table = np.array([dataclasses.astuple(shape) for shape in sorted(shapes)], dtype=np.int64)
    groups = np.array_split(table, min(MAX_CAPACITIES, len(table))) if len(table) else []
    greatest: Iterable[Ints] = np.maximum.accumulate([group.max(0) for group in groups]) if groups else []
    capacities = []
    for numbers in greatest:
        rounded = [_round_up(SLACK * number) for number in numbers.tolist()]
        shape = BatchShape(**dict(zip((f.name for f in dataclasses.fields(BatchShape)), rounded, strict=True)))
        codes = min(shape.codes, num_codes - 1)  # all but padding's
        # At least one filler patient, with a set of several events, has the rest of all.
        capacities.append(dataclasses.replace(shape, codes=codes, sets=shape.sets + 1, patients=shape.patients + 1))
    return tuple(dict.fromkeys(capacities))


def _round_up(number: float) -> int:
    if number < 1:
        return 0
    return math.ceil(2 ** (math.ceil(STEPS_PER_OCTAVE * math.log2(number) - 1e-9) / STEPS_PER_OCTAVE) - 1e-9)
