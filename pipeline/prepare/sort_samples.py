"""Sort samples by patient and time in bounded memory, whatever the number of samples and of patients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.arrays import Ints
from pipeline.prepare.name_hashes import hash_names, hash_similar
from pipeline.prepare.record_sorter import (
    Records,
    RecordSorter,
    Run,
    RunWriter,
    SortedRecords,
    SpillFile,
    cut_keys,
    to_records,
)
from pipeline.schema import Times

Hide: TypeAlias = Callable[[pl.Series], pl.Series]
"""Returns the names by which a data set calls patients of some names."""

NO_DATE = np.iinfo(np.int64).min
NO_MINUTE = -np.inf
"""Stand for a missing time, and come first."""


class Contradiction(NamedTuple):
    """A sample with two labels: the number of its patient's first sample, the patient's hashes, and its time."""

    number: int
    first: int
    second: int
    time: Any


class ContradictionError(Exception):
    """A sample has two labels: one of the patient of these hashes at ``time``, as records have it."""

    def __init__(self, hashes: tuple[int, int], time: Any) -> None:
        super().__init__("a sample has two labels")
        self.hashes, self.time = hashes, time


def sample_type(times: Times | None) -> np.dtype[Any]:
    """Return the type of samples: times are microseconds since 1970, or float64 minutes; a label NaN = unlabelled.

    ``first`` and ``second`` are hashes of the patient's name, ``similar`` that of :func:`hash_similar`; ``number``
    counts samples as they came.
    """
    fields: list[tuple[str, Any]] = [(name, np.uint64) for name in ("first", "second", "similar")]
    fields += [("time", np.float64 if times == "minute" else np.int64), ("label", np.float64), ("number", np.int64)]
    return np.dtype(fields)


@dataclass(frozen=True, slots=True)
class SortedSamples:
    """Samples by patient and time, each once.

    Attributes:
        times: what times are; None = there are none, and a patient has one sample.
        records: the samples, of :func:`sample_type`.
    """

    times: Times | None
    records: SortedRecords

    def __len__(self) -> int:
        return sum(run.num_rows for run in self.records.runs)


class SampleSorter:
    """Takes samples in any order, and gives them back sorted."""

    def __init__(self, times: Times | None, hide: Hide | None = None) -> None:
        """Sort samples whose times are ``times``, of patients whom a data set calls as ``hide`` says."""
        self._times, self._hide = times, hide
        self._sorter = RecordSorter(sample_type(times), "second", "time", "label")
        self._num_added = 0

    def add(self, patient: pl.Series, time: npt.NDArray[Any] | int, label: npt.NDArray[np.float64]) -> None:
        """Add samples: patients as names (``pipeline.prepare.names``), none missing; times and labels as in records."""
        assert isinstance(patient.dtype, pl.Enum)
        names = patient.dtype.categories.cast(pl.String)
        if self._hide is not None:
            names = self._hide(names)
        position = patient.to_physical().to_numpy()
        hashes = (each[position] for each in (*hash_names(names), hash_similar(names)))
        number = np.arange(self._num_added, self._num_added + len(patient))
        self._num_added += len(patient)
        self._sorter.add(to_records(sample_type(self._times), *hashes, time, label, number))

    def finish(self) -> SortedSamples:
        """Return all samples, each once; raise ContradictionError where two labels of a sample differ.

        The sample that it names is the first one of the patient who comes first.
        """
        records = self._sorter.finish()
        merged, wrong = _merge_all(records)
        if wrong:
            first = min(wrong)
            raise ContradictionError((first.first, first.second), first.time)
        return SortedSamples(self._times, SortedRecords((merged,), records.dtype))


def _merge_all(records: SortedRecords) -> tuple[Run, list[Contradiction]]:
    """Return sorted samples, those of one patient and time as one, and what contradicts itself in ranges of them."""
    if records.is_in_memory:
        merged, wrong = _merge(records.read((None, None)))
        return Run.of_records(merged), wrong
    writer, all_wrong = RunWriter(SpillFile(), records.dtype), []
    for keys in cut_keys(records):
        merged, wrong = _merge(records.read(keys))
        all_wrong += wrong
        writer.append(merged)
    return writer.finish(), all_wrong


def _merge(records: Records) -> tuple[Records, list[Contradiction]]:
    """Return sorted samples, each once, and the first of those with two labels of the patient who comes first."""
    patient = find_patients(records)
    is_first = np.zeros(len(records), np.bool_)
    is_first[patient] = True
    is_first[1:] |= records["time"][1:] != records["time"][:-1]
    start = np.flatnonzero(is_first)
    if len(start) == len(records):
        return records, []
    merged = records.take(start)  # the lowest label, NaN if there is no other
    highest = np.fmax.reduceat(records["label"], start)
    wrong = np.flatnonzero((merged["label"] != highest) & ~np.isnan(highest))
    if not len(wrong):
        return merged, []
    number = np.minimum.reduceat(records["number"], patient)
    number = np.repeat(number, np.diff(patient, append=len(records)))[start[wrong]]
    first = merged[wrong[np.argmin(number)]]  # of the patient's, in the order of times
    return merged, [Contradiction(int(number.min()), int(first["first"]), int(first["second"]), first["time"])]


def find_patients(records: Records) -> Ints:
    """Return where the samples of each patient begin among sorted ones."""
    first, second = records["first"], records["second"]
    begins = np.ones(len(records), np.bool_)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return np.flatnonzero(begins)
