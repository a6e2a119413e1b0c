"""What a run costs: memory over time, throughput, waiting and padding; and the lines it writes of itself."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import json
import math
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import psutil

from pipeline.schema import UserError
from pipeline.shards import write_atomically

if TYPE_CHECKING:
    from pipeline.batch import PatientBatch

Scalar: TypeAlias = str | int | float | bool | None

MEMORY_COLUMNS = (
    "seconds",  # since the start of the monitor
    "pid",
    "role",  # main or child
    "rss_bytes",  # resident: pages shared between processes are counted in each
    "uss_bytes",  # unique: what ending the process would free; empty where the system does not tell
    "cuda_allocated_bytes",  # in tensors of the main process, over all its devices; empty without CUDA
    "cuda_reserved_bytes",  # held by its caching allocator
    "event",  # what MemoryMonitor.mark() said, in the row of the main process
)


def peak_rss_bytes() -> int:
    """The most bytes that were resident in this process, or in any single child that has ended, at any time."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, ended = (unit * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")
    if status.exists():
        # Linux lets a new process inherit the peak of the one that started it; this line does not.
        own = next(
            (1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:")), own
        )
    return max(own, ended)


def release_free_memory() -> None:
    """Give memory that is free back to the system, where the C library can.

    Batches differ in shape, and glibc keeps the holes that theirs leave: a run's memory would grow for thousands of
    steps (measured: 2 MB a step) though nothing holds it.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class MemoryMonitor:
    """Samples the memory of this process and of all below it into a CSV of ``MEMORY_COLUMNS`` while the context lasts.

    A daemon thread takes the samples; a process that ends or hides meanwhile is left out of a sample.  A defect
    of the thread itself is printed as any thread's is, and ends the samples, not the run.

    Attributes:
        peak_rss_bytes: the most that all processes together held in one sample.
        peak_uss_bytes: the same of unique memory; None where the system does not tell.
    """

    def __init__(self, path: Path | None, *, interval_seconds: float = 0.5) -> None:
        self.path = path  # None = off: no samples, and marks are not noted
        self.interval_seconds = interval_seconds
        self.peak_rss_bytes = 0
        self.peak_uss_bytes: int | None = None
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None ends the thread
        self._thread = threading.Thread(target=self._run, name="memory-monitor", daemon=True)

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file = self.path.open("w", newline="", encoding="utf-8")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.path is not None:
            self._events.put(None)
            self._thread.join()

    def mark(self, event: str) -> None:
        """Take a sample now and note ``event`` (first step, validation, checkpoint …) beside it."""
        self._events.put(event)

    def _run(self) -> None:
        main = psutil.Process()
        start = time.monotonic()
        with self._file:
            writer = csv.writer(self._file)
            writer.writerow(MEMORY_COLUMNS)
            event: str | None = "start"
            while True:
                self._sample(writer, main, round(time.monotonic() - start, 3), event or "")
                self._file.flush()
                if event is None:
                    return
                try:
                    event = self._events.get(timeout=self.interval_seconds)
                except queue.Empty:
                    event = ""

    def _sample(self, writer: Any, main: psutil.Process, seconds: float, event: str) -> None:
        rss_bytes: list[int] = []
        uss_bytes: list[int | None] = []
        for process in (main, *main.children(recursive=True)):
            try:
                rss = process.memory_info().rss
                uss = _uss_bytes(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            rss_bytes.append(rss)
            uss_bytes.append(uss)
            own = process is main
            cuda = _cuda_bytes() if own else ("", "")
            role = "main" if own else "child"
            writer.writerow((seconds, process.pid, role, rss, "" if uss is None else uss, *cuda, event if own else ""))
        self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss_bytes))
        known = [uss for uss in uss_bytes if uss is not None]
        if len(known) == len(uss_bytes):
            self.peak_uss_bytes = max(self.peak_uss_bytes or 0, sum(known))


def _uss_bytes(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_full_info().uss)
    except psutil.AccessDenied:  # macOS tells only root about children
        return None


def _cuda_bytes() -> tuple[int | str, int | str]:
    """(allocated, reserved); empty where torch is not imported or has not touched a GPU: looking must not cost."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "", ""
    devices = range(torch.cuda.device_count())
    return sum(map(torch.cuda.memory_allocated, devices)), sum(map(torch.cuda.memory_reserved, devices))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a :class:`JsonLines` file; a last line that is being written, or that a crash cut, is left out.

    Raises:
        UserError: another line is not a JSON object.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object; move the file away")
        records.append(record)
    return records


class JsonLines:
    """An append-only file of one flat JSON object a line, each flushed as it is written.

    Args:
        path: the file; made where it is missing.
        resume_step: of the checkpoint from which a run goes on: lines of later steps are dropped, for the run
            writes them again.  A last line that a crash cut short is dropped in any case.

    Raises:
        UserError: as :func:`read_json_lines`.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        if path.exists():
            limit = math.inf if resume_step is None else resume_step
            kept = [json.dumps(record) + "\n" for record in read_json_lines(path) if record.get("step", 0) <= limit]
            write_atomically(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Scalar]) -> None:
        """Append ``record``; a number that is not finite becomes null, for JSON has no other word for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Wait until all is on the disk, and close."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Throughput:
    """Sums over the batches of an interval, and their rates."""

    num_patients: int = 0
    num_events: int = 0
    num_sets: int = 0
    event_cells: int = 0  # of the padded layout: patients times the longest, padding included
    set_cells: int = 0
    waited: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def of_job(cls, ranks: Sequence[Throughput]) -> Throughput:
        """Those of all ranks as one: counts added up, seconds, which ranks spend side by side, averaged."""
        job = cls(**{field.name: sum(getattr(rank, field.name) for rank in ranks) for field in dataclasses.fields(cls)})
        job.waited, job.step_seconds = job.waited / len(ranks), job.step_seconds / len(ranks)
        return job

    def add(self, batch: PatientBatch, *, waited: float, step_seconds: float, pad_to: int | None = None) -> None:
        """Count one batch.

        Args:
            batch: as the loader gave it, on the host: reading lengths from a GPU would stop it.
            waited: seconds that the step waited for the batch.
            step_seconds: seconds that it then took.
            pad_to: event cells of a padded row; by default the most events of a patient of the batch.
        """
        events, sets = batch.events_per_patient.numpy(), batch.sets_per_patient.numpy()
        self.num_patients += batch.num_patients
        self.num_events += batch.num_events
        self.num_sets += batch.num_sets
        self.event_cells += batch.num_patients * (int(events.max(initial=0)) if pad_to is None else pad_to)
        self.set_cells += batch.num_patients * int(sets.max(initial=0))
        self.waited += waited
        self.step_seconds += step_seconds

    def rates(self) -> dict[str, float]:
        """Per second of wall time, waiting included, and fractions; 0 where nothing was."""
        seconds = self.waited + self.step_seconds
        return {
            "patients_per_second": _ratio(self.num_patients, seconds),
            "events_per_second": _ratio(self.num_events, seconds),
            "data_wait_fraction": _ratio(self.waited, seconds),
            "event_padding_waste": _ratio(self.event_cells - self.num_events, self.event_cells),
            "set_padding_waste": _ratio(self.set_cells - self.num_sets, self.set_cells),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
