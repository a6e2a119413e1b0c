"""What this process takes of its machine."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
