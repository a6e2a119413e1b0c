"""Cores and memory that this process may use, and has used."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Final

import psutil

MAX_HELD: Final = 1.85
"""Times the most that a step has been seen to add to the heap that gaps and the next step may take together, beside
what is spare."""


CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return how many CPU cores this process can keep busy, at least 1.

    That is the minimum of its CPU affinity and of the CPU quotas (rounded down) of its cgroup and those above it, of
    version 1 or 2, which are mounted at ``cgroups``.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else getattr(os, "process_cpu_count", os.cpu_count)() or 1
    quotas = (quota for place in _find_cgroups(cgroups, membership, "cpu") for quota in _read_quotas(place))
    return max(1, math.floor(min([cores, *quotas])))


def usable_memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return how many bytes this process could take beside what it has, at least 0.

    That is the minimum of what the machine has available and of what its cgroup and those above it have left, of
    version 1 or 2, which are mounted at ``cgroups``.  Of files that a cgroup has read what was not used lately is free.
    """
    left = (left for place in _find_cgroups(cgroups, membership, "memory") for left in _read_memory(place))
    return max(0, min([psutil.virtual_memory().available, *left]))


def _find_cgroups(cgroups: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups that may limit what a controller gives, and of those above them."""
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        folder = root / path.lstrip("/")
        # A container may see its own cgroup as the root, whatever the path says: a folder that is missing has no limit.
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _read_quotas(place: Path) -> Iterator[float]:
    """Yield the CPU quota of a cgroup, in cores, if it has one."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        if all((place / name).exists() for name in files):
            quota, period = " ".join((place / name).read_text() for name in files).split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _read_memory(place: Path) -> Iterator[int]:
    """Yield the bytes that are left of the memory of a cgroup, if it is limited."""
    for prefix, names in {"": ("max", "current"), "total_": ("limit_in_bytes", "usage_in_bytes")}.items():
        limit, usage, statistics = (place / f"memory.{name}" for name in (*names, "stat"))
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            numbers = dict(line.split() for line in statistics.read_text().splitlines())
            yield int(text) - int(usage.read_text()) + int(numbers[f"{prefix}inactive_file"])


def peak_rss_bytes() -> int:
    """Return the peak of resident memory, in bytes, of this process or of any single child that has ended."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, ended = (unit * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")
    if status.exists():  # Linux lets a new process inherit the peak of the one that started it; this line does not
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        own = 1024 * int(peaks[0]) if peaks else own
    return max(own, ended)


class HeapTrimmer:
    """Gives free memory back before a step that would raise the peak: gaps and what it adds are more than a step needs.

    Batches differ in shape, and a large block fits into no gap that smaller ones left: after each step the heap may be
    higher, although nothing holds the memory.  Giving it back before every step would cost a quarter of the time.

    Args:
        limit: bytes that this process may hold; None = as many as there are.
        spare: bytes that gaps may take beside what a step needs.
    """

    def __init__(self, limit: int | None = None, *, spare: int = 0) -> None:
        self._limit, self._spare = limit or sys.maxsize, spare
        self._floor: int | None = None  # resident memory after it went back
        self._largest = 0  # bytes that a step added to it, and bytes per event of that step
        self._rate = 0.0
        self._is_first = False

    def begin_step(self, num_events: int) -> None:
        """Look at this process's memory before a step; what the first one makes for good is no gap."""
        if self._floor is None:
            self._floor = 0
            return
        held, adds = rss_bytes(), self._rate * num_events
        gaps = held - self._floor
        too_many = gaps + adds > MAX_HELD * self._largest + self._spare
        self._is_first = too_many or (held + adds > self._limit and gaps > adds / 4)
        if self._is_first:
            release_free_memory()
            self._floor = rss_bytes()

    def end_step(self, num_events: int) -> None:
        """Learn what a step adds from the first one after memory went back."""
        grown = rss_bytes() - (self._floor or 0)
        if self._is_first and grown > self._largest:
            self._largest, self._rate = grown, grown / max(num_events, 1)


def exit_with_parent() -> None:
    """Start a thread that ends this process, made by ``multiprocessing``, when its parent ends, killed or not."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def rss_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def release_free_memory() -> None:
    """Return free memory of the C heap to the system, where the C library can (glibc; musl cannot)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
