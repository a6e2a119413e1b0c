"""Merge some spills to one, so that no partition is cut from more than ``MAX_SPILLS`` files.

Each partition opens every spill: work that grows with the square of the input.  Where there are too many spills,
consecutive ones are merged first, as few as needed, and so a row is written at most once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import concatenate_ranges, offsets_from_sizes
from pipeline.prepare.column_file import ColumnWriter, measure_texts, open_columns, split_texts
from pipeline.prepare.sources.reading import FILE, ROW
from pipeline.prepare.spill_files import (
    FIRST_ROW,
    HASH,
    STATIC_INSTANT,
    Array,
    find_patients,
    merge_names,
    narrow,
    read_rows,
    smallest_type,
)
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE
from pipeline.storage.files import replace_atomically

MAX_SPILLS: Final = 256
"""Maximum number of files from which a partition is cut, and that are merged to one."""

STEP_ROWS: Final = 1 << 22
"""Rows that are merged at once, about: some 300 MB."""

FILES: Final = f"{FILE}.begins", f"{FILE}.bytes"


@dataclass(frozen=True, slots=True)
class MergedSpills:
    """What is said of merged spills."""

    num_rows: int


def group_spills(spills: Sequence[str], max_spills: int) -> list[tuple[str, ...]]:
    """Return which spills are merged, from the first on; with the others, at most ``max_spills`` are left.

    Beyond the square of ``max_spills`` a group has more than that.
    """
    num_merged, num_groups = count_merged(len(spills), max_spills)
    cuts = np.linspace(0, num_merged, num_groups + 1).round().astype(int).tolist() if num_groups else [0]
    return [tuple(spills[start:stop]) for start, stop in itertools.pairwise(cuts)]


def count_merged(num_spills: int, max_spills: int) -> tuple[int, int]:
    """Return how many spills are merged, and to how many."""
    if num_spills <= max_spills:
        return 0, 0
    size = max(max_spills, math.ceil(num_spills / max_spills))
    num_groups = math.ceil((num_spills - max_spills) / (size - 1))
    return num_spills - max_spills + num_groups, num_groups


def name_merged(number: int) -> str:
    """Return the path of a merged spill, below the work folder."""
    return f"merged/{number:05d}.columns"


def merge_spills(work: Path, number: int, spills: Sequence[str]) -> MergedSpills:
    """Merge spills to one with all their patients and rows, each patient's in the order of the spills."""
    paths = [work / spill for spill in spills]
    variables, codes = _merge_variables(paths)
    columns, num_files, num_rows = _plan_columns(paths, len(variables))
    columns |= measure_texts(VARIABLE, variables)
    steps = max(1, -(-num_rows // STEP_ROWS))
    first_file = offsets_from_sizes(num_files).tolist()
    path = work / name_merged(number)
    with replace_atomically(path, is_synced=False) as temporary, closing(ColumnWriter(temporary, columns)) as writer:
        writer.append_texts(VARIABLE, variables)
        _append_texts(writer, paths, FILE)
        ends = np.zeros(2, np.int64)  # of rows and of the bytes of names, so far
        for step in range(steps):
            parts = [_read_part(path, step, steps, codes[at], first_file[at]) for at, path in enumerate(paths)]
            ends += _append_step(writer, parts, columns, ends)
        for name, end in zip((FIRST_ROW, f"{PATIENT_ID}.begins"), ends, strict=True):
            writer.append(name, np.array([end]))
    return MergedSpills(num_rows)


def _merge_variables(paths: Sequence[Path]) -> tuple[pa.Array, list[Array]]:
    """Return all variables in order, and the positions among them of each spill's."""
    merged = pa.array([], pa.large_string())
    for path in paths:
        merged, _ = merge_names([merged, _read_variables(path)])
    positions = (pc.index_in(_read_variables(path), value_set=merged).to_numpy() for path in paths)
    return merged, [narrow(position, len(merged)) for position in positions]


def _read_variables(path: Path) -> pa.Array:
    with open_columns(path) as spill:
        return spill.read_texts(VARIABLE)


def _plan_columns(paths: Sequence[Path], num_variables: int) -> tuple[dict[str, tuple[Any, int]], Array, int]:
    """Return dtypes and lengths of merged arrays (not of the variables' texts), files of each spill, and all rows."""
    lengths: dict[str, list[int]] = {}
    dtypes: dict[str, set[Any]] = {}
    for path in paths:
        with open_columns(path) as spill:
            for name in spill.names:
                lengths.setdefault(name, []).append(spill.length(name))
                if spill.length(name):
                    dtypes.setdefault(name, set()).add(spill.dtype(name))
    rows = sum(lengths[VALUE])
    num_files = np.array(lengths[FILES[0]], np.int64) - 1
    total = {name: sum(sizes) for name, sizes in lengths.items()}
    for name in (FILES[0], FIRST_ROW, f"{PATIENT_ID}.begins"):
        total[name] -= len(paths) - 1  # the end of one is the begin of the next
    columns = {name: (np.result_type(*dtypes.get(name, [np.int64])), length) for name, length in total.items()}
    columns[VARIABLE] = smallest_type(num_variables), rows
    columns[FILE] = smallest_type(int(num_files.sum())), rows
    return columns, num_files, rows


def _append_texts(writer: ColumnWriter, paths: Sequence[Path], name: str) -> None:
    """Append the texts of all spills, one spill after the other."""
    end = 0
    for path in paths:
        with open_columns(path) as spill:
            begins = spill.read(f"{name}.begins")
            writer.append(f"{name}.begins", begins[:-1] + end)
            writer.append(f"{name}.bytes", spill.read(f"{name}.bytes"))
            end += int(begins[-1])
    writer.append(f"{name}.begins", np.array([end]))


def _read_part(path: Path, step: int, steps: int, codes: Array, first_file: int) -> dict[str, Any]:
    """Return a spill's patients of one step, and their rows, with positions of variables and files in the merged."""
    with open_columns(path) as spill:
        patients, count, rows = find_patients(spill, step, steps)
        found = read_rows(spill, rows)
        return {
            **found,
            HASH: spill.read(HASH, *patients),
            "count": count,
            PATIENT_ID: spill.read_texts(PATIENT_ID, *patients),
            ROW: spill.read(ROW, *rows),
            VARIABLE: codes[found[VARIABLE]],
            FILE: spill.read(FILE, *rows) + np.int64(first_file),
        }


def _append_step(
    writer: ColumnWriter, parts: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[Any, int]], ends: Array
) -> Array:
    """Append patients and rows in the order of hashes after ``ends``; return the numbers of rows and bytes of names."""
    hashes, counts = (np.concatenate([part[name] for part in parts]) for name in (HASH, "count"))
    order = np.argsort(hashes, kind="stable")
    rows = concatenate_ranges(offsets_from_sizes(counts)[:-1][order], counts[order])
    ids = pa.concat_arrays([part[PATIENT_ID] for part in parts]).take(pa.array(order))
    begins, content = split_texts(ids)
    writer.append(HASH, hashes[order])
    writer.append(FIRST_ROW, ends[0] + offsets_from_sizes(counts[order])[:-1])
    writer.append(f"{PATIENT_ID}.begins", ends[1] + begins[:-1])
    writer.append(f"{PATIENT_ID}.bytes", content)
    for name in (MINUTE, VALUE, ROW, VARIABLE, FILE, SET_INDEX):
        if name in columns:
            joined = np.concatenate([_cast(part[name], columns[name][0]) for part in parts if name in part])
            writer.append(name, joined[rows])
    return np.array([len(rows), len(content)])


def _cast(values: Array, dtype: Any) -> Array:
    """Return values of another type; static rows, of whole microseconds, have no minute among minutes."""
    if values.dtype == np.int64 and dtype == np.float64:
        return np.where(values == STATIC_INSTANT, -math.inf, values)
    return values.astype(dtype, copy=False)
