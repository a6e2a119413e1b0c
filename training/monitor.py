"""The memory of a run's processes over time."""

from __future__ import annotations

import csv
import queue
import threading
import time
from pathlib import Path
from typing import Any, Self

import psutil
import torch

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


class MemoryMonitor:
    """Samples the memory of this process and of all below it into a CSV of ``MEMORY_COLUMNS`` while the context lasts.

    A daemon thread takes the samples; a process that ends or hides meanwhile is left out of a sample.  A defect
    of the thread itself is printed as any thread's is, and ends the samples, not the run.

    Attributes:
        path: of the CSV; None = off.
        peak_rss_bytes: the most that all processes together held in one sample.
        peak_uss_bytes: the same of unique memory; None where the system does not tell.
    """

    def __init__(self, path: Path | None, *, interval_seconds: float = 0.5) -> None:
        self.path, self.interval_seconds = path, interval_seconds
        self.peak_rss_bytes = 0
        self.peak_uss_bytes: int | None = None
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None ends the thread
        self._thread = threading.Thread(target=self._run, name="memory-monitor", daemon=True)

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file = self.path.open("w", newline="", encoding="utf-8")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._events.put(None)
            self._thread.join()

    def mark(self, event: str) -> None:
        """Take a sample now and note ``event`` (first step, validation, checkpoint …) beside it."""
        self._events.put(event)

    def _run(self) -> None:
        main, start = psutil.Process(), time.monotonic()
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
        held: list[tuple[int, int | None]] = []
        for process in (main, *main.children(recursive=True)):
            try:
                rss, uss = process.memory_info().rss, _uss_bytes(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            held.append((rss, uss))
            own = ("main", rss, uss, *_cuda_bytes(), event) if process is main else ("child", rss, uss, None, None, "")
            writer.writerow((seconds, process.pid, *own))
        self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss for rss, _ in held))
        known = [uss for _, uss in held if uss is not None]
        if len(known) == len(held):
            self.peak_uss_bytes = max(self.peak_uss_bytes or 0, sum(known))


def _uss_bytes(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_full_info().uss)
    except psutil.AccessDenied:  # macOS tells only root about children
        return None


def _cuda_bytes() -> tuple[int | None, int | None]:
    """Return the allocated and the reserved bytes; None where no GPU is in use: looking must not cost."""
    if not torch.cuda.is_initialized():
        return None, None
    devices = range(torch.cuda.device_count())
    return sum(map(torch.cuda.memory_allocated, devices)), sum(map(torch.cuda.memory_reserved, devices))
