"""Peak memory of a training step: measured, fitted to what is in a batch, and batches taken in parts that fit.

The peak of a step is close to linear in the events, sets, squared sets and patients of its batch, and a constant (one
gradient of the largest weights, before it is added): ``benchmarks.memory_model`` says how close.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.loading.batch import PatientBatch
from pipeline.sampling.cost import CostModel
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

MARGIN = 0.9
"""Of what is free, the share that predictions may fill; the rest is for fragments, and for what they miss."""


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes of ``device`` that PyTorch held at any moment of ``step``, over those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


def amounts(batch: PatientBatch) -> list[float]:
    """What :class:`pipeline.sampling.cost.CostModel` weighs of a batch, in the order of its fields."""
    sets = batch.sets_per_patient.double()
    return [batch.num_events, batch.num_sets, float(sets.square().sum()), batch.num_patients, 1]


def fit(amounts_N5: npt.NDArray[np.float64], peak_N: npt.NDArray[np.float64]) -> CostModel:
    """The weights, none below 0, of least squared relative error.

    Of few columns the best choice of those that are not 0 can be found by trying all.
    """
    scaled = amounts_N5 / peak_N[:, None]
    best, least = np.zeros(5), np.inf
    for size in range(1, 6):
        for columns in itertools.combinations(range(5), size):
            chosen = scaled[:, columns]
            reach = np.linalg.norm(chosen, axis=0)
            weights = np.linalg.lstsq(chosen / reach, np.ones(len(peak_N)), rcond=None)[0] / reach
            error = float(np.square(chosen @ weights - 1).sum())
            if (weights >= 0).all() and error < least:
                best, least = np.zeros(5), error
                best[list(columns)] = weights
    event, set_, set_squared, patient, batch = best.tolist()
    return CostModel(event=event, set=set_, set_squared=set_squared, patient=patient, batch=batch)


def measured(
    step: Callable[[PatientBatch], object], batches: Sequence[PatientBatch], device: torch.device
) -> tuple[CostModel, int]:
    """The model of peaks fitted to ``step`` of each batch, and the least of these peaks; gradients are there before."""
    step(batches[0])
    peaks = [peak_of(functools.partial(step, batch), device) for batch in batches]
    return fit(np.array([amounts(batch) for batch in batches]), np.array(peaks, np.float64)), min(peaks)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """What a step of this run may take of each process's memory, and how much a batch will.

    Attributes:
        peak: bytes of a step.
        step_bytes: what there is for one.
        batch_size: patients of a global batch with which it was found.
    """

    peak: CostModel
    step_bytes: float
    batch_size: int

    def parts(self, batch: PatientBatch) -> list[PatientBatch]:
        """``batch``, in as few parts as need be so that each fits; a patient who does not is a part alone."""
        cost = self.peak.predict(batch.events_per_patient.numpy(), batch.sets_per_patient.numpy())
        limit = self.step_bytes - self.peak.batch
        if cost.sum() <= limit:
            return [batch]
        starts, used = [0], 0.0
        for patient, bytes_ in enumerate(cost.tolist()):
            if used and used + bytes_ > limit:
                starts.append(patient)
                used = 0.0
            used += bytes_
        return [batch.between(*ends) for ends in itertools.pairwise([*starts, batch.num_patients])]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> StepMemory:
        """Raises:
        UserError: the file is not one that :meth:`save` wrote.
        """
        try:
            saved = json.loads(path.read_bytes())
            return cls(
                peak=CostModel(**saved["peak"]),
                step_bytes=float(saved["step_bytes"]),
                batch_size=int(saved["batch_size"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it, and the run measures its memory anew") from error


def halved(parts: list[PatientBatch]) -> list[PatientBatch]:
    """Each part in two; a part of one patient stays."""
    middles = [(part, (part.num_patients + 1) // 2) for part in parts]
    halves = [
        half for part, middle in middles for half in (part.between(0, middle), part.between(middle, part.num_patients))
    ]
    return [half for half in halves if half.num_patients]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room: for Python, for PyTorch on a GPU or (which has no class of its own) the CPU, or for
    the stack of a thread.
    """
    said = ("can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


def held_bytes(device: torch.device, parameter_bytes: int) -> int:
    """What this process holds between two steps: weights, optimiser's moments, gradients, and on the CPU all else."""
    now = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return now + 3 * parameter_bytes


def free_bytes(device: torch.device, processes: int) -> int:
    """What this process could hold in all, if the others of this machine's ``processes`` take as much."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // processes + psutil.Process().memory_info().rss
