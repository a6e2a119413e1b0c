"""Sort samples by patient and time in bounded memory: sorted runs in a temporary file, merged a range at a time.

Memory follows the number of patients that are named, not the number of samples.  The temporary file, in ``$TMPDIR``,
has no name, so nothing is left of it when the process ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pipeline.arrays import Ints, concatenate_ranges, offsets_from_sizes
from pipeline.prepare.name_numbers import NameNumbers
from pipeline.schema import Times, UserError

Records: TypeAlias = npt.NDArray[Any]
"""Samples [N] of fields ``patient`` int64, ``time`` and ``label`` float64 (NaN = unlabelled)."""

RUN_ROWS: Final = 1 << 19
"""Minimum number of samples of a run, and about the maximum of a range."""

STRIDE: Final = 1 << 10
"""One of so many patients of a run stays in memory, by which a range is found in it."""

MAX_GAP: Final = 1 << 16
"""Bytes between two ranges of a file up to which both are read at once."""

MAX_READ: Final = 1 << 22
"""About the maximum of bytes that are read at once, unless one patient has more."""

NO_DATE: Final = np.iinfo(np.int64).min
NO_MINUTE: Final = -np.inf
"""Stand for a missing time, and come first."""


class ContradictionError(Exception):
    """A sample has two labels: one of the patient ``patient`` at ``time``, as records have it."""

    def __init__(self, patient: str, time: Any) -> None:
        super().__init__("a sample has two labels")
        self.patient, self.time = patient, time


class SpillFile:
    """A file without a name in ``$TMPDIR``, which goes with its object; a full disk is a UserError."""

    def __init__(self) -> None:
        with _naming_full_disks():
            self._descriptor, name = tempfile.mkstemp()
        os.unlink(name)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = 0

    def append(self, records: Records) -> None:
        with _naming_full_disks(), open(self._descriptor, "ab", closefd=False) as file:  # has no path
            file.write(records.data)
        self.num_bytes += records.nbytes

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, start)


@contextmanager
def _naming_full_disks() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = tempfile.gettempdir()
        raise UserError(f"no space left to sort labels in {where}; set TMPDIR to a folder of a larger disk") from None


class _Run(NamedTuple):
    start: int  # first record in the file
    num_rows: int
    patients: Ints  # of one record in STRIDE


@dataclass(frozen=True, slots=True)
class SortedSamples:
    """Samples by patient and time, each once.

    Attributes:
        patients: [P] distinct names.
        offsets: [P + 1] the samples of each patient among all.
        times: what times are; None = there are none, and a patient has one sample.
        records: the samples, in memory or in a file.
    """

    patients: pl.Series
    offsets: Ints
    times: Times | None
    records: Records | SpillFile

    @property
    def sizes(self) -> Ints:
        """Return [P] the number of samples of each patient."""
        return np.diff(self.offsets)

    def gather(self, patients: Ints) -> Records:
        """Return the samples of the patients [n] of these numbers, one patient after another."""
        starts, sizes = self.offsets[patients], self.sizes[patients]
        if isinstance(self.records, np.ndarray):
            return self.records[concatenate_ranges(starts, sizes)]
        return _read_ranges(self.records, starts, sizes, record_type(self.times))


def _read_ranges(file: SpillFile, starts: Ints, sizes: Ints, dtype: np.dtype[Any]) -> Records:
    """Return ranges of the records of a file, one after another; those that lie close together are read at once."""
    read = np.empty(int(sizes.sum()), dtype)
    order = np.argsort(starts)
    low, size, target = starts[order], sizes[order], offsets_from_sizes(sizes)[:-1][order]
    high = low + size
    is_far = (low[1:] - high[:-1]) * dtype.itemsize > MAX_GAP
    is_next = low[1:] * dtype.itemsize // MAX_READ != low[:-1] * dtype.itemsize // MAX_READ
    cuts = np.flatnonzero(np.concatenate([[True], is_far | is_next])[: len(low)]).tolist()
    for first, last in pairwise([*cuts, len(low)]):
        own, start = slice(first, last), int(low[first])
        content = file.read(start * dtype.itemsize, (int(high[last - 1]) - start) * dtype.itemsize)
        places = concatenate_ranges(low[own] - start, size[own])
        read[concatenate_ranges(target[own], size[own])] = np.frombuffer(content, dtype)[places]
    return read


def record_type(times: Times | None) -> np.dtype[Any]:
    """Return the type of records: times are microseconds since 1970, or float64 minutes."""
    time = np.float64 if times == "minute" else np.int64
    return np.dtype([("patient", np.int64), ("time", time), ("label", np.float64)])


class SampleSorter:
    """Takes samples in any order, and gives them back sorted."""

    def __init__(self, times: Times | None) -> None:
        self._times, self._dtype = times, record_type(times)
        self._names = NameNumbers()
        self._sizes = np.zeros(0, np.int64)
        self._held: list[Records] = []
        self._runs: list[_Run] = []
        self._file: SpillFile | None = None

    def add(self, patient: pl.Series, time: npt.NDArray[Any] | int, label: npt.NDArray[np.float64]) -> None:
        """Add samples: patients as names (``pipeline.prepare.names``), none missing; times and labels as in records."""
        assert isinstance(patient.dtype, pl.Enum)
        records = np.empty(len(patient), self._dtype)
        numbers = self._names.number(patient.dtype.categories.to_arrow().cast(pa.large_string()))
        records["patient"] = numbers[patient.to_physical().to_numpy()]
        records["time"], records["label"] = time, label
        self._sizes = np.pad(self._sizes, (0, len(self._names) - len(self._sizes)))
        self._sizes += np.bincount(records["patient"], minlength=len(self._sizes))
        self._held.append(records)
        if sum(map(len, self._held)) >= RUN_ROWS:
            self._write_run()

    def finish(self) -> SortedSamples:
        """Return all samples, each once; raise ContradictionError where two labels of a sample differ."""
        patients = pl.Series("patient_id", pl.from_arrow(self._names.names))
        if self._file is None:
            merged = self._merge(_sort(self._take_held()), patients)
            sizes = np.bincount(merged["patient"], minlength=len(patients))
            return SortedSamples(patients, offsets_from_sizes(sizes), self._times, merged)
        self._write_run()
        file, sizes = SpillFile(), np.zeros(len(patients), np.int64)
        for low, high in cut_ranges(self._sizes, RUN_ROWS):
            merged = self._merge(_sort(np.concatenate([self._read(run, low, high) for run in self._runs])), patients)
            sizes[low:high] = np.bincount(merged["patient"] - low, minlength=high - low)
            file.append(merged)
        return SortedSamples(patients, offsets_from_sizes(sizes), self._times, file)

    def _take_held(self) -> Records:
        held, self._held = self._held, []
        return np.concatenate([np.empty(0, self._dtype), *held])

    def _write_run(self) -> None:
        records = _sort(self._take_held())
        if self._file is None:
            self._file = SpillFile()
        start = self._file.num_bytes // self._dtype.itemsize
        self._file.append(records)
        self._runs.append(_Run(start, len(records), records["patient"][::STRIDE].copy()))

    def _read(self, run: _Run, low: int, high: int) -> Records:
        """Return the records of a run whose patients have numbers from ``low`` to below ``high``."""
        assert self._file is not None
        first, last = np.searchsorted(run.patients, [low, high])
        start, stop = max(0, int(first) - 1) * STRIDE, min(run.num_rows, int(last) * STRIDE)
        size = self._dtype.itemsize
        content = self._file.read((run.start + start) * size, max(0, stop - start) * size)
        records = np.frombuffer(content, self._dtype)
        return records[slice(*np.searchsorted(records["patient"], [low, high]))]

    @staticmethod
    def _merge(records: Records, patients: pl.Series) -> Records:
        """Return sorted records, those of one patient and time as one."""
        if not len(records):
            return records
        is_first = np.ones(len(records), np.bool_)
        is_first[1:] = (np.diff(records["patient"]) != 0) | (records["time"][1:] != records["time"][:-1])
        start = np.flatnonzero(is_first)
        merged = records if len(start) == len(records) else records[start]  # the lowest label, NaN if there is no other
        highest = np.fmax.reduceat(records["label"], start)
        wrong = np.flatnonzero((merged["label"] != highest) & ~np.isnan(highest))
        if len(wrong):
            raise ContradictionError(patients[int(merged["patient"][wrong[0]])], merged["time"][wrong[0]])
        return merged


def _sort(records: Records) -> Records:
    return records[np.lexsort((records["label"], records["time"], records["patient"]))]


def cut_ranges(sizes: Ints, max_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges (low, high) of parts that have at most ``max_rows`` together, or are one part."""
    offsets = offsets_from_sizes(sizes)
    low = 0
    while low < len(sizes):
        high = max(low + 1, int(np.searchsorted(offsets, offsets[low] + max_rows, side="right")) - 1)
        yield low, high
        low = high
