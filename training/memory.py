"""Peak memory of a training step: a model fitted to measured steps, and batches taken in parts that fit.

The peak of a step is close to linear in the events, sets, squared sets and patients of its batch, and a constant (one
gradient of the largest weights, before it is added): ``benchmarks.memory_model`` says how close.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.loading.batch import PatientBatch
from pipeline.machine import rss_bytes, usable_memory
from pipeline.sampling.cost import CostModel
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

MARGIN = 0.9
"""Share of the free memory that predictions may fill; the rest is for fragments, and for what they miss."""


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch's profiler would write lines of its own
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first tensor, and takes large pages then


def measure_peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of ``device`` that PyTorch held at any moment of ``step``, over those before it."""
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
    del recorded, events
    gc.collect()  # a profiler refers to itself and to all that it recorded, tens of megabytes
    return int(held.max(initial=0))


def count_amounts(batch: PatientBatch) -> list[float]:
    """Return what :class:`pipeline.sampling.cost.CostModel` weighs of a batch, in the order of its fields."""
    sets = batch.sets_per_patient.double()
    return [batch.num_events, batch.num_sets, float(sets.square().sum()), batch.num_patients, 1]


def fit_peaks(amounts_N5: npt.NDArray[np.float64], peak_N: npt.NDArray[np.float64]) -> CostModel:
    """Return the cost model, no weight below 0, with the least squared relative error on measured peaks."""
    from scipy.optimize import nnls  # noqa: PLC0415 (half a second that only a limit of memory needs)

    relative = amounts_N5 / peak_N[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0
    event, set_, set_squared, patient, batch = (nnls(relative / scale, np.ones(len(peak_N)))[0] / scale).tolist()
    return CostModel(event=event, set=set_, set_squared=set_squared, patient=patient, batch=batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """What a step of this run may take of each process's memory, and how much a batch will.

    Attributes:
        peak: bytes of a step.
        step_bytes: bytes that each process has for a step.
        batch_bytes: bytes that a global batch may take in all; decided once, for the number of devices with which the
            run began, so that a run resumed on another number has the same batches.
    """

    peak: CostModel
    step_bytes: float
    batch_bytes: float
    batch_size: int

    def split(self, batch: PatientBatch) -> list[PatientBatch]:
        """Return ``batch`` in as few parts as need be so that each fits; a patient who does not is a part alone."""
        cost = self.peak.predict(batch.events_per_patient.numpy(), batch.sets_per_patient.numpy())
        limit = self.step_bytes - self.peak.batch
        if cost.sum() <= limit:
            return [batch]
        starts, used = [0], 0.0
        for patient, num_bytes in enumerate(cost.tolist()):
            if used and used + num_bytes > limit:
                starts.append(patient)
                used = 0.0
            used += num_bytes
        return [batch.between(*ends) for ends in itertools.pairwise([*starts, batch.num_patients])]

    def save(self, path: Path) -> None:
        """Write to ``path``, a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> StepMemory:
        """Read what :meth:`save` wrote; raise UserError where the file is missing, or not one of these."""
        try:
            saved = json.loads(path.read_bytes())
            sizes = {name: float(saved[name]) for name in ("step_bytes", "batch_bytes")}
            return cls(peak=CostModel(**saved["peak"]), batch_size=int(saved["batch_size"]), **sizes)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            lost = "without it the batches of the run are not known: start a new --output_dir"
            raise UserError(f"{path}: cannot be read ({error}); {lost}") from error


def halve(batch: PatientBatch) -> list[PatientBatch]:
    """Return a batch in two halves; one of a single patient stays."""
    middle = (batch.num_patients + 1) // 2
    halves = [batch.between(0, middle), batch.between(middle, batch.num_patients)]
    return [half for half in halves if half.num_patients]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ended: for Python, PyTorch on a GPU or the CPU, a file, a library or a thread's stack."""
    # There is no class for these: what PyTorch, the system (opening a file, loading a library), Python and oneDNN say.
    signs = ("n't allocate memory", "Cannot allocate memory", "can't start new thread", "could not create a primitive")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def held_bytes(device: torch.device, parameter_bytes: int) -> int:
    """Return what this process holds between two steps: weights, moments, gradients, and on the CPU all else."""
    now = torch.cuda.memory_allocated(device) if device.type == "cuda" else rss_bytes()
    return now + 3 * parameter_bytes


def free_bytes(device: torch.device, processes: int) -> int:
    """Return what this process could hold in all, if the others of this machine's ``processes`` take as much."""
    if device.type == "cuda":
        sharing = math.ceil(processes / torch.cuda.device_count())
        return torch.cuda.mem_get_info(device)[0] // sharing + torch.cuda.memory_reserved(device)
    return usable_memory() // processes + rss_bytes()
