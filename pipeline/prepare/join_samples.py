"""Join samples with the patients of an index by hashes of names, in bounded memory, a range of hashes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.arrays import Ints, concatenate_ranges
from pipeline.prepare.name_hashes import hash_names, hash_similar, look_up
from pipeline.prepare.record_sorter import Records, RecordSorter, SortedRecords, cut_keys, to_records
from pipeline.prepare.sort_samples import SortedSamples, find_patients, sample_type

PATIENT: Final = np.dtype([("first", np.uint64), ("second", np.uint64), ("row", np.int64)])
"""A patient of an index: two hashes of its name, and its row."""

NAMED: Final = np.dtype([("first", np.uint64), ("second", np.uint64), ("similar", np.uint64)])
"""A patient of an index: two hashes of its name, and that of similar names."""

SIMILAR: Final = np.dtype([("similar", np.uint64), ("is_stranger", np.bool_)])
"""The hash of similar names of a patient who is a stranger to the index, or one of it without a label."""


class _Match(NamedTuple):
    """Patients and samples of a range of hashes.

    Attributes:
        patients: [n] of an index.
        samples: [N] by patient and time.
        starts: [P + 1] the samples of each patient who has some.
        number: [n] which of these each patient of the index is; -1 = none.
    """

    patients: Records
    samples: Records
    starts: Ints
    number: Ints

    @property
    def is_stranger(self) -> npt.NDArray[np.bool_]:
        """Return [P] whether the index lacks a patient who has samples."""
        found = np.ones(len(self.starts) - 1, np.bool_)
        found[self.number[self.number >= 0]] = False
        return found


def _match(samples: SortedSamples, patients: SortedRecords) -> Iterator[_Match]:
    for keys in cut_keys(patients, samples.records):
        rows, records = patients.read(keys), samples.records.read(keys)
        start = find_patients(records)
        named = records.take(start)
        number = look_up(named["first"], named["second"], rows["first"], rows["second"])
        yield _Match(rows, records, np.append(start, len(records)), number)


@dataclass(frozen=True, slots=True)
class JoinedSamples:
    """The samples of the patients of an index.

    Attributes:
        records: of fields ``row`` (of the index, int64), and ``time`` and ``label`` of :func:`sample_type`, sorted.
        num_found: number of patients of the index who have samples.
        num_strange: number of samples of other patients, which are not among the records.
    """

    records: SortedRecords
    num_found: int
    num_strange: int


def sort_patients(names: Iterable[pl.Series]) -> SortedRecords:
    """Return the patients of an index by the hashes of their names, which come in parts."""
    sorter, num_rows = RecordSorter(PATIENT), 0
    for part in names:
        sorter.add(to_records(PATIENT, *hash_names(part), np.arange(num_rows, num_rows := num_rows + len(part))))
    return sorter.finish()


def join_samples(samples: SortedSamples, patients: SortedRecords) -> JoinedSamples:
    """Return the samples of the patients of an index, of :func:`sort_patients`, in the order of their rows."""
    of_sample = sample_type(samples.times)
    dtype = np.dtype([("row", np.int64), ("time", of_sample["time"]), ("label", of_sample["label"])])
    sorter, num_found, num_strange = RecordSorter(dtype, "time"), 0, 0
    for match in _match(samples, patients):
        has_samples, sizes = match.number >= 0, np.diff(match.starts)
        number = match.number[has_samples]
        chosen = match.samples.take(concatenate_ranges(match.starts[number], sizes[number]))
        row = np.repeat(match.patients["row"][has_samples], sizes[number])
        sorter.add(to_records(dtype, row, chosen["time"], chosen["label"]))
        num_found += len(number)
        num_strange += len(match.samples) - len(chosen)
    return JoinedSamples(sorter.finish(), num_found, num_strange)


def count_similar_strangers(samples: SortedSamples, names: Iterable[pl.Series]) -> int:
    """Return how many patients of the samples are not among ``names``, but similar to one who has no sample."""
    named, similar = RecordSorter(NAMED), RecordSorter(SIMILAR)
    for part in names:
        named.add(to_records(NAMED, *hash_names(part), hash_similar(part)))
    for match in _match(samples, named.finish()):
        strangers = match.samples.take(match.starts[:-1][match.is_stranger])["similar"]
        unlabelled = match.patients["similar"][match.number < 0]
        for hashes, is_stranger in ((strangers, True), (unlabelled, False)):
            similar.add(to_records(SIMILAR, hashes, is_stranger))
    found = similar.finish()
    return sum(_count_similar(found.read(keys)) for keys in cut_keys(found))


def _count_similar(records: Records) -> int:
    is_stranger = records["is_stranger"]
    return int(np.isin(records["similar"][is_stranger], records["similar"][~is_stranger]).sum())
