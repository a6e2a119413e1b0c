"""Where a batch stands in training, and what its global batch holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.arrays import Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """What a global batch holds, over all ranks: the divisors of a data-parallel mean.

    ``num_labelled`` is of each task.
    """

    num_patients: int
    num_labelled: tuple[int, ...]
    num_sets: int
    num_events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBatch:
    """The patients of a batch over all ranks, in the order of the plan; B patients, S sets, after truncation."""

    sample_key: list[str]  # [B] as PatientBatch.sample_key
    num_sets: Ints  # [B] of each patient
    set_size: Ints  # [S] events of each set


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlace:
    """Where a batch stands in training; equal on all ranks.

    Attributes:
        cursor: number of the batch in its epoch, from 0.
        step: number of batches handed out before it, over all epochs of the loader's life.
        counts: of the global batch, exact, after truncation.
        global_batch: returns the lengths of the global batch, without communication.  It refers to all patients in
            memory, so call it in the transform and do not keep it.
    """

    epoch: int
    cursor: int
    step: int
    counts: StepCounts
    global_batch: Callable[[], GlobalBatch]
