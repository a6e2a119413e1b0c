"""Spill the kept rows of a piece to disk, sorted by a hash of the patient; read the rows of a partition back.

A partition is a range of hashes, so it is one run of rows in each spill, and any number of partitions can be cut from
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
from pipeline.prepare.arrow_files import read_partition_slice, read_row_range, write_parquet, write_table
from pipeline.prepare.clean import REJECTS_SCHEMA, clean, is_blank
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.rules import apply_ranges
from pipeline.prepare.sources.reading import FILE, ROW, Piece
from pipeline.prepare.sources.source import Source
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE

STATIC_INSTANT: Final = np.iinfo(np.int64).min
"""Stands for the missing instant of a static event."""

BATCH_ROWS: Final = 1 << 14
"""Rows of a spill's record batch: half a MiB."""

DICTIONARY: Final = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True, slots=True)
class SpilledPiece:
    """Counts of a spilled piece."""

    num_rows: int
    num_kept: int
    num_clipped: int  # values that a rule changed
    rejects: dict[str, int]  # the other rows, by reason
    columns: dict[str, str]  # names and dtypes of the kept columns besides patients and variables


def spill_piece(source: Source, piece: Piece, number: int, options: BuildOptions, work: Path) -> SpilledPiece:
    """Read and clean a piece; its kept rows go to ``spills/``, the others to ``rejects/``."""
    pseudonyms, files = options.pseudonyms, list(piece.files)
    raw = source.read(piece)
    kept, rejected = clean(raw)
    num_clipped = 0
    if options.rules.ranges:
        kept, outside, num_clipped = apply_ranges(kept, options.rules.ranges)
        rejected = pl.concat([rejected, outside])
    others = pl.Series(raw.patients, dtype=pl.String)
    if pseudonyms is not None:  # files are often named like patients
        kept, rejected = pseudonyms.hide_kept(kept), pseudonyms.hide_rejected(rejected)
        others, files = pseudonyms.hide_names(others), [pseudonyms.hide(name) for name in files]
    present = pl.concat([frame[PATIENT_ID].unique().cast(pl.String) for frame in (kept, rejected)]).drop_nulls()
    patients = list(dict.fromkeys([*present.filter(~is_blank(present)), *others]))
    hashes = options.split_rule.hash_patients(patients)[0]
    _write_spill(work / "spills" / f"{number:05d}", kept, files, patients, hashes)
    if rejected.height:
        names = pl.Series(files, dtype=pl.String).gather(rejected["file"]).alias("file")
        table = rejected.with_columns(names).select(REJECTS_SCHEMA.names).to_arrow().cast(REJECTS_SCHEMA)
        write_parquet(work / "rejects" / f"{number:05d}.parquet", REJECTS_SCHEMA, [table])
    return SpilledPiece(
        num_rows=raw.rows.height,
        num_kept=kept.height,
        num_clipped=num_clipped,
        rejects=dict(rejected["reason"].value_counts().iter_rows()),
        columns={name: str(dtype) for name, dtype in kept.drop(PATIENT_ID, VARIABLE).schema.items()},
    )


def _write_spill(
    stem: Path, kept: pl.DataFrame, files: list[str], patient_ids: list[str], hashes: npt.NDArray[np.uint64]
) -> None:
    """Write ``<stem>.events.arrow`` and ``<stem>.patients.arrow``; patients without a kept row are named too."""
    by_hash = np.argsort(hashes, kind="stable")
    rank = np.empty(len(patient_ids), dtype=np.int32)
    rank[by_hash] = np.arange(len(patient_ids))
    patient = rank[_find_positions(kept[PATIENT_ID], patient_ids)]
    start = np.flatnonzero(np.diff(patient, prepend=-1))  # rows of a patient mostly stand together
    by_patient = np.argsort(patient[start], kind="stable")
    order = concatenate_ranges(start[by_patient], np.diff(start, append=len(patient))[by_patient])
    minute = kept[MINUTE].to_physical()  # float64 minutes, or int64 microseconds
    minute = minute if minute.dtype.is_float() else minute.fill_null(STATIC_INSTANT)
    variables = kept[VARIABLE].unique().cast(pl.String).to_list()
    numbers = {name: kept[name] for name in (ROW, SET_INDEX) if name in kept.columns} | {MINUTE: minute}
    columns = {name: pa.array(column.to_numpy()[order]) for name, column in numbers.items()}
    columns |= {
        VARIABLE: _to_dictionary(_find_positions(kept[VARIABLE], variables)[order], variables),
        VALUE: kept[VALUE].to_arrow().take(order),
        FILE: _to_dictionary(kept[FILE].to_numpy()[order].astype(np.int32), files),
    }
    write_table(stem.with_suffix(".events.arrow"), pa.table(columns), max_rows=BATCH_ROWS)
    counts = np.bincount(patient, minlength=len(patient_ids)).astype(np.int64)
    names = pa.array(patient_ids, pa.string()).take(by_hash)
    table = pa.table({PATIENT_ID: names, "hash": hashes[by_hash], "num_events": counts})
    write_table(stem.with_suffix(".patients.arrow"), table)


def _to_dictionary(positions: npt.NDArray[np.int32], texts: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(positions, pa.array(texts, pa.string()))


def _find_positions(column: pl.Series, texts: list[str]) -> npt.NDArray[np.int32]:
    """Return [E] the position of each name among ``texts``, which hold them all."""
    assert isinstance(column.dtype, pl.Enum)
    found = pc.index_in(column.dtype.categories.to_arrow().cast(pa.string()), value_set=pa.array(texts, pa.string()))
    positions: npt.NDArray[np.int32] = found.fill_null(-1).to_numpy()  # a name without a kept row is never looked up
    return positions[column.to_physical().to_numpy()]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRows:
    """The kept rows of a partition's patients, each patient's in the order of pieces and rows."""

    patient_ids: list[str]  # in order, also of patients without a kept row
    variables: list[str]  # in order
    patient: npt.NDArray[np.int32]  # [E] position in patient_ids
    variable: npt.NDArray[np.int32]  # [E] position in variables
    table: pa.Table  # E rows of minute, value, file, row and perhaps set_index


def read_partition(folder: Path, num_pieces: int, partition: int, num_partitions: int) -> PartitionRows:
    """Return the rows of partition ``partition`` of ``num_partitions``, from the spills of all pieces."""
    names: list[pa.Array] = []
    counts: list[npt.NDArray[np.int64]] = []
    events: list[pa.Table] = []
    for number in range(num_pieces):
        path = folder / f"{number:05d}.patients.arrow"
        patients, previous = read_partition_slice(path, partition, num_partitions)
        names.append(patients[PATIENT_ID])
        counts.append(patients["num_events"].to_numpy())
        start = int(previous["num_events"].to_numpy().sum())
        stop = start + int(counts[-1].sum())
        events.append(read_row_range(folder / f"{number:05d}.events.arrow", start, stop, BATCH_ROWS))
    variables = [part[VARIABLE].chunk(0) if part.num_rows else pa.array([], DICTIONARY) for part in events]
    patient_ids, ranks = _merge_names(names)
    variable_names, codes = _merge_names([part.dictionary for part in variables])
    return PartitionRows(
        patient_ids=patient_ids,
        variables=variable_names,
        patient=np.concatenate([np.repeat(rank, count) for rank, count in zip(ranks, counts, strict=True)]),
        variable=np.concatenate([code[part.indices.to_numpy()] for code, part in zip(codes, variables, strict=True)]),
        table=pa.concat_tables(part.drop_columns(VARIABLE) for part in events).unify_dictionaries().combine_chunks(),
    )


def _merge_names(parts: Sequence[pa.Array]) -> tuple[list[str], list[npt.NDArray[np.int32]]]:
    """Return all distinct names in order, and the positions among them of each part's names."""
    joined = pa.chunked_array(parts, pa.string())
    unique = joined.unique()
    merged = unique.take(pc.array_sort_indices(unique))
    position = pc.index_in(joined, value_set=merged)  # one table of texts for all parts
    return merged.to_pylist(), np.split(position.to_numpy(), np.cumsum([len(part) for part in parts])[:-1])
