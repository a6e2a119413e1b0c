"""Splits of patients that the input gives, sorted by hashes of the patients, of which a partition reads its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.arrays import Ints
from pipeline.prepare.arrow_files import bound_partition
from pipeline.prepare.column_file import ColumnWriter, open_columns
from pipeline.prepare.name_hashes import look_up
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.record_sorter import Records, RecordSorter, cut_keys, to_records
from pipeline.prepare.sources.reading import SPLIT
from pipeline.prepare.sources.source import GivenSplits
from pipeline.prepare.splits import SplitRule
from pipeline.schema import PATIENT_ID, SPLITS, UserError
from pipeline.storage.files import replace_atomically

KNOWN: Final = "known.columns"
"""File in the work folder."""

KNOWN_TYPE: Final = np.dtype([("hash", np.uint64), ("other", np.uint64), (SPLIT, np.int8)])
"""A patient: the hashes of :meth:`SplitRule.hash_patients`, which stand for the name, and the position in SPLITS."""

MAX_WRONG: Final = 1 << 16
"""Maximum number of patients in two splits among whom the one is looked for that is named."""

Known = Mapping[str, npt.NDArray[Any]]
"""The fields of ``KNOWN_TYPE`` of some patients, sorted."""


def write_known_splits(given: GivenSplits | None, options: BuildOptions, work: Path) -> None:
    """Write the splits that an input gives to ``KNOWN``; raise UserError where a patient is in two."""
    sorter, num_rows = RecordSorter(KNOWN_TYPE, "other", SPLIT), 0
    for rows in given.read() if given else ():
        split = rows[SPLIT].replace_strict(list(SPLITS), range(len(SPLITS)), return_dtype=pl.Int8)
        sorter.add(to_records(KNOWN_TYPE, *_hash(rows, options), split))
        num_rows += rows.height
    known, wrong = sorter.finish(), np.empty(0, KNOWN_TYPE)
    with replace_atomically(work / KNOWN) as temporary:
        writer = ColumnWriter(temporary, {name: (KNOWN_TYPE[name], num_rows) for name in KNOWN_TYPE.fields or {}})
        for keys in cut_keys(known):
            records = known.read(keys)
            wrong = np.concatenate([wrong, _find_wrong(records)])[:MAX_WRONG]
            for name in KNOWN_TYPE.fields or {}:
                writer.append(name, records[name])
        writer.close()
    if given and len(wrong):
        raise _describe_wrong(given, wrong, options)


def _hash(rows: pl.DataFrame, options: BuildOptions) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    patients = rows[PATIENT_ID] if options.hide is None else options.hide(rows[PATIENT_ID])
    return options.split_rule.hash_patients(patients.to_list())


def _find_wrong(records: Records) -> Records:
    """Return one of the sorted records of each patient in two splits."""
    before, after = records[:-1], records[1:]
    is_same = (before["hash"] == after["hash"]) & (before["other"] == after["other"])
    return before[is_same & (before[SPLIT] != after[SPLIT])]


def _describe_wrong(given: GivenSplits, wrong: Records, options: BuildOptions) -> UserError:
    """Return the error of the first by name of some patients in two splits, sorted by hashes."""
    names: list[str] = []
    for rows in given.read():
        is_wrong = look_up(wrong["hash"], wrong["other"], *_hash(rows, options)) >= 0
        names = sorted({*names, *rows[PATIENT_ID].filter(pl.Series(is_wrong))})[:1]
    num_before, numbers = dict.fromkeys(SPLITS, 0), dict[str, int]()
    for rows in given.read():
        for split in SPLITS:
            own = rows[PATIENT_ID].filter(rows[SPLIT] == split)
            if split not in numbers and len(at := (own == names[0]).arg_true()):
                numbers[split] = num_before[split] + int(at[0]) + 1
            num_before[split] += len(own)
    first, second = sorted(numbers)[:2]
    return UserError(f"{given.path}: patient number {numbers[first]} of {first} is in {second} too; leave it in one")


def read_known_splits(work: Path, partition: int, num_partitions: int) -> Known:
    """Return the patients of a partition whose splits the input gives."""
    with open_columns(work / KNOWN) as file:
        start, stop = (file.search("hash", bound) for bound in bound_partition(partition, num_partitions))
        return {name: file.read(name, start, stop) for name in KNOWN_TYPE.fields or {}}


def assign_known_splits(patient_ids: list[str], known: Known, rule: SplitRule) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return [P] the positions of splits in ``SPLITS``, and [P] whether a hash decided, not the input."""
    by, other = rule.hash_patients(patient_ids)
    found = look_up(known["hash"], known["other"], by, other)
    given = np.append(known[SPLIT], np.int8(-1))[found]
    return np.where(found < 0, rule.split_by(other), given), found < 0
