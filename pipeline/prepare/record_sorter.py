"""Sort records in bounded memory: sorted runs in a temporary file, read together a range of keys at a time.

The temporary file, in ``$TMPDIR``, has no name, so nothing is left of it when the process ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.schema import UserError

Records: TypeAlias = npt.NDArray[Any]
"""Structured array [N], whose first field is the key."""

RUN_ROWS: Final = 1 << 18
"""Minimum number of records of a run, and about the maximum of a range."""

STRIDE: Final = 1 << 8
"""The key of one of so many records of a run stays in memory, by which a range is found in it."""

KeyRange: TypeAlias = tuple[int | None, int | None]
"""The first key and the one after the last; None = from the first, or to the last."""


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


@dataclass(frozen=True, slots=True)
class Run:
    """Records sorted by their key.

    Attributes:
        content: the records in memory, or a file that holds them from ``start`` on.
        dtype: of the records.
        num_rows: number of records.
        keys: of one record in ``STRIDE``, the first included.
        start: bytes before them in the file.
    """

    content: Records | SpillFile
    dtype: np.dtype[Any]
    num_rows: int
    keys: npt.NDArray[Any]
    start: int = 0

    @classmethod
    def of_records(cls, records: Records) -> Run:
        return cls(records, records.dtype, len(records), _pick_keys(records))

    def read(self, keys: KeyRange) -> Records:
        """Return the records whose keys are in a range."""
        if isinstance(self.content, np.ndarray):
            return _cut(self.content, keys)
        first, last = _find(self.keys, keys)
        size = self.dtype.itemsize
        start, stop = max(0, first - 1) * STRIDE, min(self.num_rows, last * STRIDE)
        content = self.content.read(self.start + start * size, max(0, stop - start) * size)
        return _cut(np.frombuffer(content, self.dtype), keys)


def to_records(dtype: np.dtype[Any], first: npt.NDArray[Any], *others: Any) -> Records:
    """Return records of these fields; the first one has as many values as there are records."""
    assert dtype.names is not None
    records = np.empty(len(first), dtype)
    for name, values in zip(dtype.names, (first, *others), strict=True):
        records[name] = values
    return records


def _key(records: Records) -> npt.NDArray[Any]:
    assert records.dtype.names is not None
    key: npt.NDArray[Any] = records[records.dtype.names[0]]
    return key


def _pick_keys(records: Records, num_before: int = 0) -> npt.NDArray[Any]:
    """Return a copy of the keys of one record in ``STRIDE``; ``num_before`` records of the run stand before these."""
    return _key(records)[-num_before % STRIDE :: STRIDE].copy()


def _find(sorted_keys: npt.NDArray[Any], keys: KeyRange) -> tuple[int, int]:
    """Return the first position of a range of keys, and the one after its last."""
    low, high = keys
    start = 0 if low is None else np.searchsorted(sorted_keys, sorted_keys.dtype.type(low))
    stop = len(sorted_keys) if high is None else np.searchsorted(sorted_keys, sorted_keys.dtype.type(high))
    return int(start), int(stop)


def _cut(records: Records, keys: KeyRange) -> Records:
    return records[slice(*_find(_key(records), keys))]


class RunWriter:
    """Writes a run to a file, a part of it after the other."""

    def __init__(self, file: SpillFile, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype, self._start = file, dtype, file.num_bytes
        self._keys: list[npt.NDArray[Any]] = []
        self._num_rows = 0

    def append(self, records: Records) -> None:
        self._file.append(records)
        self._keys.append(_pick_keys(records, self._num_rows))
        self._num_rows += len(records)

    def finish(self) -> Run:
        keys = np.concatenate([_key(np.empty(0, self._dtype)), *self._keys])
        return Run(self._file, self._dtype, self._num_rows, keys, self._start)


class RecordSorter:
    """Takes records in any order; those of one key may be sorted by other fields too."""

    def __init__(self, dtype: np.dtype[Any], *others: str) -> None:
        """Take records of ``dtype``; ``others`` are the fields after the key by which they are sorted."""
        self._dtype, self._others = dtype, others
        self._held: list[Records] = []
        self._num_held = 0
        self._runs: list[Run] = []
        self._file: SpillFile | None = None

    def add(self, records: Records) -> None:
        self._held.append(records)
        self._num_held += len(records)
        if self._num_held >= RUN_ROWS:
            self._write_run()

    def finish(self) -> SortedRecords:
        """Return all records."""
        if self._file is None:
            self._runs.append(Run.of_records(self._sort_held()))
        elif self._num_held:
            self._write_run()
        return SortedRecords(tuple(self._runs), self._dtype, self._others)

    def _write_run(self) -> None:
        self._file = self._file or SpillFile()
        writer = RunWriter(self._file, self._dtype)
        writer.append(self._sort_held())
        self._runs.append(writer.finish())

    def _sort_held(self) -> Records:
        held, self._held, self._num_held = self._held, [], 0
        return _sort(np.concatenate([np.empty(0, self._dtype), *held]), self._others)


@dataclass(frozen=True, slots=True)
class SortedRecords:
    """Records in runs, of which ranges of keys are read in order: by key, and by the fields ``others`` after it."""

    runs: tuple[Run, ...]
    dtype: np.dtype[Any]
    others: tuple[str, ...] = ()

    @property
    def is_in_memory(self) -> bool:
        return isinstance(self.runs[0].content, np.ndarray)

    def read(self, keys: KeyRange) -> Records:
        """Return the records of a range of keys."""
        if len(self.runs) == 1:
            return self.runs[0].read(keys)
        return _sort(np.concatenate([run.read(keys) for run in self.runs]), self.others)


def cut_keys(*sorted_records: SortedRecords) -> Iterator[KeyRange]:
    """Yield ranges of keys, in order, that hold all records of about ``RUN_ROWS`` together, unless one key has more.

    A range may have up to ``STRIDE`` more of each run.
    """
    keys = np.sort(np.concatenate([run.keys for records in sorted_records for run in records.runs]))
    bounds = np.unique(keys[:: max(1, RUN_ROWS // STRIDE)])[1:]
    yield from pairwise([None, *bounds.tolist(), None])


def _sort(records: Records, others: Sequence[str]) -> Records:
    key = _key(records)
    order = np.argsort(key)
    in_order = key[order]
    if others and (in_order[1:] == in_order[:-1]).any():
        order = np.lexsort((*(records[name] for name in reversed(others)), key))
    return records.take(order)
