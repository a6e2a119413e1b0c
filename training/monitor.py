"""What a run costs: memory over time, throughput, waiting and padding; and the lines it writes of itself."""

from __future__ import annotations

import csv
import queue
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

if TYPE_CHECKING:
    pass


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
