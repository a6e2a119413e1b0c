"""Kept rows on disk between the first two stages: a spill a piece, sorted by a hash of the patient.

A partition is a range of hashes, so it is one run of rows in each spill, and partitions of any number can be cut from
the same spills once the number of events is known.  Spills are uncompressed Arrow files of small record batches, and a
partition reads those that hold its rows.  (Mapping them would cost no copy; but the system maps megabytes around each
run of rows, from every spill, and memory would grow with the number of spills.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import concatenate_ranges
from pipeline.prepare.sources.source import FILE, ROW
from pipeline.prepare.splits import HASH_BITS, SplitRule
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE
from pipeline.storage.files import replace_atomically

STATIC_INSTANT = np.iinfo(np.int64).min
"""Stands for no instant at all: the event is static."""

BATCH_ROWS: Final = 1 << 14
"""Of a spill's record batches: half a MiB."""

TEXT = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRows:
    """The kept rows of a partition's patients, each patient's in the order of pieces and rows.

    Attributes:
        patient_ids: P names in order, patients without a kept row included.
        variables: V names in order.
        patient: [E] int32, position in ``patient_ids``.
        variable: [E] int32, position in ``variables``.
        table: E rows of ``minute``, ``value``, ``file``, ``row`` and perhaps ``set_index``.
    """

    patient_ids: list[str]
    variables: list[str]
    patient: npt.NDArray[np.int32]
    variable: npt.NDArray[np.int32]
    table: pa.Table


def write_spill(
    folder: Path, number: int, kept: pl.DataFrame, files: Sequence[str], patients: Sequence[str], rule: SplitRule
) -> None:
    """Spill the kept rows of piece ``number``.

    Args:
        kept: as ``pipeline.prepare.clean.clean`` gives them.
        files: names of the piece's files.
        patients: every patient that the piece names, in any order, those without a kept row included.
    """
    patient_ids = list(dict.fromkeys(patients))
    hashes = rule.hashes(patient_ids)[0]
    by_hash = np.argsort(hashes, kind="stable")
    rank = np.empty(len(patient_ids), dtype=np.int32)
    rank[by_hash] = np.arange(len(patient_ids))
    patient = rank[_positions(kept[PATIENT_ID], patient_ids)]
    start = np.flatnonzero(np.diff(patient, prepend=-1))  # rows of a patient mostly stand together
    by_patient = np.argsort(patient[start], kind="stable")
    order = concatenate_ranges(start[by_patient], np.diff(start, append=len(patient))[by_patient])
    minute = kept[MINUTE].to_physical()  # float64 minutes, or int64 microseconds
    if not minute.dtype.is_float():
        minute = minute.fill_null(STATIC_INSTANT)
    variables = kept[VARIABLE].unique().cast(pl.String).to_list()
    columns = {
        MINUTE: pa.array(minute.to_numpy()[order]),
        VARIABLE: pa.DictionaryArray.from_arrays(
            _positions(kept[VARIABLE], variables)[order], pa.array(variables, pa.string())
        ),
        VALUE: kept[VALUE].to_arrow().take(order),
        FILE: pa.DictionaryArray.from_arrays(
            kept[FILE].to_numpy()[order].astype(np.int32), pa.array(files, pa.string())
        ),
        ROW: pa.array(kept[ROW].to_numpy()[order]),
    }
    if SET_INDEX in kept.columns:
        columns[SET_INDEX] = pa.array(kept[SET_INDEX].to_numpy()[order])
    write_table(folder / f"{number:05d}.events.arrow", pa.table(columns), max_rows=BATCH_ROWS)
    counts = np.bincount(patient, minlength=len(patient_ids))
    named = {
        PATIENT_ID: pa.array(patient_ids, pa.string()).take(by_hash),
        "hash": hashes[by_hash],
        "num_events": counts.astype(np.int64),
    }
    write_table(folder / f"{number:05d}.patients.arrow", pa.table(named))


def _positions(column: pl.Series, texts: list[str]) -> npt.NDArray[np.int32]:
    """[E] position of each name among ``texts``, which hold them all."""
    assert isinstance(column.dtype, pl.Enum)
    place = pc.index_in(column.dtype.categories.to_arrow().cast(pa.string()), value_set=pa.array(texts, pa.string()))
    positions: npt.NDArray[np.int32] = place.fill_null(-1).to_numpy()  # a name without a kept row is never looked up
    return positions[column.to_physical().to_numpy()]


def read_partition(folder: Path, num_pieces: int, partition: int, num_partitions: int) -> PartitionRows:
    """The rows of partition ``partition`` of ``num_partitions``, from the spills of all pieces."""
    names: list[pa.Array] = []
    counts: list[npt.NDArray[np.int64]] = []
    events: list[pa.Table] = []
    for number in range(num_pieces):
        patients, before = read_slice(folder / f"{number:05d}.patients.arrow", partition, num_partitions)
        names.append(patients[PATIENT_ID])
        counts.append(patients["num_events"].to_numpy())
        start = int(before["num_events"].to_numpy().sum())
        events.append(_read_rows(folder / f"{number:05d}.events.arrow", start, start + int(counts[-1].sum())))
    variables = [part[VARIABLE].chunk(0) if part.num_rows else pa.array([], TEXT) for part in events]
    patient_ids, places = _merge_names(names)
    variable_names, codes = _merge_names([part.dictionary for part in variables])
    return PartitionRows(
        patient_ids=patient_ids,
        variables=variable_names,
        patient=np.concatenate([np.repeat(place, count) for place, count in zip(places, counts, strict=True)]),
        variable=np.concatenate([code[part.indices.to_numpy()] for code, part in zip(codes, variables, strict=True)]),
        table=pa.concat_tables(part.drop_columns(VARIABLE) for part in events).unify_dictionaries().combine_chunks(),
    )


def _merge_names(parts: Sequence[pa.Array]) -> tuple[list[str], list[npt.NDArray[np.int32]]]:
    """All names in order, without repeats, and the positions among them of each part's names."""
    together = pa.chunked_array(parts, pa.string())
    unique = together.unique()
    merged = unique.take(pc.array_sort_indices(unique))
    position = pc.index_in(together, value_set=merged)  # one table of texts for all parts
    return merged.to_pylist(), np.split(position.to_numpy(), np.cumsum([len(part) for part in parts])[:-1])


def read_slice(path: Path, partition: int, num_partitions: int) -> tuple[pa.Table, pa.Table]:
    """Of a table sorted by ``hash``: the rows of a partition, and the rows before it."""
    table = read_table(path)
    bounds = [-(-(number << HASH_BITS) // num_partitions) for number in (partition, partition + 1)]
    start, stop = np.searchsorted(table["hash"].to_numpy(), np.array(bounds, dtype=np.uint64))
    return table.slice(start, stop - start), table.slice(0, start)


def _read_rows(path: Path, start: int, stop: int) -> pa.Table:
    """Rows of an Arrow file of batches of ``BATCH_ROWS``; each column is one array."""
    first = start // BATCH_ROWS
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(first, -(-stop // BATCH_ROWS))]
    table = pa.Table.from_batches(batches, reader.schema).slice(start - first * BATCH_ROWS, stop - start)
    # A part of a single batch is copied, or it would keep all of the batch in memory, times the number of spills.
    return table.take(np.arange(stop - start)) if len(batches) == 1 else table.combine_chunks()


def read_table(path: Path) -> pa.Table:
    """An Arrow file, mapped: columns cost memory when they are touched."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def write_table(path: Path, table: pa.Table, max_rows: int | None = None) -> None:
    """``table`` as one record batch, so that a column is one array; or as batches of ``max_rows``."""
    with replace_atomically(path) as temporary, pa.ipc.new_file(temporary, table.schema) as file:
        file.write_table(table.combine_chunks(), max_rows)
