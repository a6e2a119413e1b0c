"""Spills: files of kept rows, sorted by a hash of the patient, from which the rows of a partition are read.

A partition is a range of hashes, so it is one run of rows in each spill, and any number of partitions can be cut from
the same spills once the number of events is known.  Only that run is read.  Where a row came from is left on the disk,
until it turns out to be one to reject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Ints, concatenate_ranges, find_runs, offsets_from_sizes
from pipeline.prepare import names
from pipeline.prepare.arrow_files import bound_partition
from pipeline.prepare.column_file import ColumnFile, open_columns, write_columns
from pipeline.prepare.sources.reading import FILE, ROW
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE

STATIC_INSTANT: Final = np.iinfo(np.int64).min
"""Stands for the missing instant of a static event."""

HASH: Final = "hash"
FIRST_ROW: Final = "first_row"

Array = npt.NDArray[Any]


def write_spill(path: Path, kept: pl.DataFrame, files: list[str], patient_ids: list[str], hashes: Array) -> None:
    """Write the rows ``kept``, whose ``file`` is a position in ``files``; patients without a kept row are named too."""
    by_hash = np.argsort(hashes, kind="stable")
    rank = np.empty(len(patient_ids), dtype=np.int32)
    rank[by_hash] = np.arange(len(patient_ids))
    patient = _find_positions(kept[PATIENT_ID], patient_ids, rank)
    start = find_runs(patient)  # rows of a patient mostly stand together
    by_patient = np.argsort(patient[start], kind="stable")
    order = concatenate_ranges(start[by_patient], np.diff(start, append=len(patient))[by_patient])
    minute = kept[MINUTE].to_physical()  # float64 minutes, or int64 microseconds
    if minute.null_count() == len(minute):
        minute = pl.repeat(STATIC_INSTANT, len(minute), dtype=pl.Int64, eager=True)
    minute = minute.fill_null(-math.inf if minute.dtype.is_float() else STATIC_INSTANT)
    variables = names.list_present(kept[VARIABLE])
    columns = {
        MINUTE: minute.to_numpy(),
        VARIABLE: narrow(_find_positions(kept[VARIABLE], variables), len(variables)),
        VALUE: kept[VALUE].fill_null(math.nan).to_numpy(),
        FILE: narrow(kept[FILE].to_numpy(), len(files)),
        ROW: narrow(row := kept[ROW].to_numpy(), 1 + int(row.max(initial=0))),
        **{name: kept[name].to_numpy() for name in (SET_INDEX,) if name in kept.columns},
    }
    counts = np.bincount(patient, minlength=len(patient_ids))
    in_order = {name: column.take(order) for name, column in columns.items()}
    texts = {PATIENT_ID: pa.array(patient_ids, pa.string()).take(by_hash), VARIABLE: variables, FILE: files}
    write_columns(
        path,
        {HASH: hashes[by_hash], FIRST_ROW: offsets_from_sizes(counts), **in_order},
        {name: pa.array(values, pa.string()) for name, values in texts.items()},
    )


def narrow(numbers: Array, limit: int) -> Array:
    """Return numbers from 0 to below ``limit`` in as few bytes as hold them."""
    return numbers.astype(smallest_type(limit))


def smallest_type(limit: int) -> np.dtype[Any]:
    """Return the type that holds numbers from 0 to below ``limit``."""
    return np.min_scalar_type(max(limit - 1, 0))


def _find_positions(column: pl.Series, texts: list[str], rank: npt.NDArray[np.int32] | None = None) -> Array:
    """Return [E] the position of each name among ``texts``, which hold them all, or the ``rank`` of that position."""
    assert isinstance(column.dtype, pl.Enum)
    found = pc.index_in(column.dtype.categories.to_arrow().cast(pa.string()), value_set=pa.array(texts, pa.string()))
    positions: npt.NDArray[np.int32] = found.fill_null(-1).to_numpy()  # a name without a kept row is never looked up
    of_names = positions if rank is None else rank[positions]
    return of_names.take(column.to_physical().to_numpy())


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one spill, from the first to the one before the second of ``rows``."""

    path: Path
    rows: tuple[int, int]

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRows:
    """The kept rows of a partition's patients, each patient's in the order of pieces and rows."""

    patient_ids: list[str]  # in order, also of patients without a kept row
    variables: list[str]  # in order
    patient: npt.NDArray[np.int32]  # [E] position in patient_ids
    variable: npt.NDArray[np.int32]  # [E] position in variables
    minute: Array  # [E] float64, minus infinity of static events, or int64 microseconds, then STATIC_INSTANT
    value: npt.NDArray[np.float32]  # [E] NaN where there is no number
    set_index: npt.NDArray[np.int64] | None  # [E]
    runs: list[Run]  # where the rows lie, E in all

    def find_sources(self, positions: Ints) -> tuple[pa.Array, Ints]:
        """Return [N] the files and the rows in them that rows at ``positions`` [N], in any order, came from."""
        order = np.argsort(positions, kind="stable")
        begins = offsets_from_sizes(np.array([run.num_rows for run in self.runs], np.int64))
        cuts = np.searchsorted(positions[order], begins)
        files, rows = [pa.array([], pa.large_string())], [np.zeros(0, np.int64)]
        for number, run in enumerate(self.runs):
            own = positions[order[cuts[number] : cuts[number + 1]]] - begins[number]
            if len(own):
                with open_columns(run.path) as spill:
                    file, row = (spill.read(name, *run.rows)[own] for name in (FILE, ROW))
                    files.append(spill.read_texts(FILE).take(pa.array(file)))
                rows.append(row.astype(np.int64))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_arrays(files).take(pa.array(back)), np.concatenate(rows)[back]


def read_partition(paths: Sequence[Path], partition: int, num_partitions: int) -> PartitionRows:
    """Return the rows of partition ``partition`` of ``num_partitions``, from all spills."""
    runs: list[Run] = []
    patients: list[pa.Array] = []
    counts: list[Ints] = []
    variables: list[pa.Array] = []
    columns: list[dict[str, Array]] = []
    for path in paths:
        with open_columns(path) as spill:
            which, count, rows = find_patients(spill, partition, num_partitions)
            patients.append(spill.read_texts(PATIENT_ID, *which))
            counts.append(count)
            runs.append(Run(path, rows))
            columns.append(read_rows(spill, rows))
            variables.append(_pick_texts(spill, VARIABLE, columns[-1]))
    patient_ids, ranks = merge_names(patients)
    variable_names, codes = merge_names(variables)
    _unify_minutes(columns)
    joined = {
        name: np.concatenate([part[name] for part in columns if name in part])
        for name in (MINUTE, VALUE, SET_INDEX)
        if any(name in part for part in columns)
    }
    return PartitionRows(
        patient_ids=patient_ids.to_pylist(),
        variables=variable_names.to_pylist(),
        patient=np.concatenate([np.repeat(rank, count) for rank, count in zip(ranks, counts, strict=True)]),
        variable=np.concatenate([code[part[VARIABLE]] for code, part in zip(codes, columns, strict=True)]),
        minute=joined[MINUTE],
        value=joined[VALUE],
        set_index=joined.get(SET_INDEX),
        runs=runs,
    )


def find_patients(
    spill: ColumnFile, partition: int, num_partitions: int
) -> tuple[tuple[int, int], Ints, tuple[int, int]]:
    """Return which patients of a spill are of a partition, how many rows each has, and which rows these are."""
    first, last = (spill.search(HASH, bound) for bound in bound_partition(partition, num_partitions))
    first_row = spill.read(FIRST_ROW, first, last + 1)
    return (first, last), np.diff(first_row), (int(first_row[0]), int(first_row[-1]))


def read_rows(spill: ColumnFile, rows: tuple[int, int]) -> dict[str, Array]:
    """Return what rows say; a spill without rows says nothing of set indices."""
    kept = [name for name in (MINUTE, VARIABLE, VALUE, SET_INDEX) if name in spill.names]
    return {name: spill.read(name, *rows) for name in kept}


def _pick_texts(spill: ColumnFile, name: str, columns: dict[str, Array]) -> pa.Array:
    """Return the texts that occur in a column of positions, which become positions among these."""
    is_there = np.bincount(columns[name], minlength=spill.length(f"{name}.begins") - 1) > 0
    columns[name] = (np.cumsum(is_there, dtype=np.int32) - 1)[columns[name]]
    return spill.read_texts(name).filter(pa.array(is_there))


def _unify_minutes(parts: Sequence[dict[str, Array]]) -> None:
    """Give static rows the type that the minutes of the others have."""
    kind = "f" if any(len(part[MINUTE]) and part[MINUTE].dtype.kind == "f" for part in parts) else "i"
    for part in parts:
        if part[MINUTE].dtype.kind != kind:  # static, or no row at all
            size = len(part[MINUTE])
            part[MINUTE] = np.full(size, -math.inf) if kind == "f" else np.full(size, STATIC_INSTANT)


def merge_names(parts: Sequence[pa.Array]) -> tuple[pa.Array, list[npt.NDArray[np.int32]]]:
    """Return all distinct names in order, and the positions among them of each part's names."""
    joined = pa.chunked_array(parts, pa.large_string())
    unique = joined.unique()
    merged = unique.take(pc.array_sort_indices(unique))
    position = pc.index_in(joined, value_set=merged)  # one table of texts for all parts
    return merged, np.split(position.to_numpy(), np.cumsum([len(part) for part in parts])[:-1])
