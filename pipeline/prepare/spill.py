"""Spill the kept rows of a piece to disk, sorted by a hash of the patient; read the rows of a partition back.

A partition is a range of hashes, so it is one run of rows in each spill, and any number of partitions can be cut from
the same spills once the number of events is known.  Spills are uncompressed Arrow files of small record batches, and a
partition reads those that hold its rows.  (Mapping them would cost no copy; but the system maps megabytes around each
run of rows, from every spill, and memory would grow with the number of spills.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import concatenate_ranges, find_runs
from pipeline.prepare import names
from pipeline.prepare.arrow_files import read_partition_slice, read_row_range, write_parquet, write_table
from pipeline.prepare.clean import REJECTS_SCHEMA, clean, describe_rejects
from pipeline.prepare.columns import to_patient_names
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.rules import apply_ranges
from pipeline.prepare.scales import Scale, measure_scales
from pipeline.prepare.sources.reading import FILE, ROW, SITE, Piece
from pipeline.prepare.sources.source import RawRows, Source
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VALUE, VARIABLE, UserError

COUNTS: Final = ("num_rows", "num_source_rows", "num_kept", "num_clipped", "num_spills")

STATIC_INSTANT: Final = np.iinfo(np.int64).min
"""Stands for the missing instant of a static event."""

SPILL_ROWS: Final = 1 << 20
"""Minimum number of rows of a spill, but for the last one of a piece."""

BATCH_ROWS: Final = 1 << 14
"""Rows of a spill's record batch: half a MiB."""

DICTIONARY: Final = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True, slots=True)
class SpilledPiece:
    """Counts of a spilled piece."""

    num_rows: int
    num_source_rows: int  # fewer where a row of a file has several events
    num_kept: int
    num_clipped: int  # values that a rule changed
    num_spills: int
    rejects: dict[str, int]  # the other rows, by reason
    columns: dict[str, str]  # dtypes of minutes and set indices; static minutes fit any
    examples: dict[str, str]  # by reason, the column that is at fault, and the form of a value without its content
    scales: list[Scale]


def spill_piece(source: Source, piece: Piece, number: int, options: BuildOptions, work: Path) -> SpilledPiece:
    """Read and clean a piece; its kept rows go to ``spills/``, the others to ``rejects/``."""
    spills: list[SpilledPiece] = []
    parts: list[CleanedPart] = []
    sites = [source.name_site(name) for name in piece.files]
    for raw in source.read(piece):
        parts.append(CleanedPart.clean(raw, options))
        if sum(part.num_rows for part in parts) >= SPILL_ROWS:
            spills.append(_spill_parts(parts, piece, sites, options, work / f"{number:05d}.{len(spills):05d}"))
            parts = []
    if parts or not spills:
        spills.append(_spill_parts(parts, piece, sites, options, work / f"{number:05d}.{len(spills):05d}"))
    kinds = [spill.columns for spill in spills if spill.num_kept]
    return SpilledPiece(
        **{name: sum(getattr(spill, name) for spill in spills) for name in COUNTS},
        rejects=dict(sum((Counter(spill.rejects) for spill in spills), Counter[str]())),
        columns=_join_columns(piece.files[0], kinds),
        examples={reason: text for spill in reversed(spills) for reason, text in spill.examples.items()},
        scales=[scale for spill in spills for scale in spill.scales],
    )


@dataclass(frozen=True, slots=True)
class CleanedPart:
    """Cleaned rows of a piece whose columns have the same types."""

    kept: pl.DataFrame
    rejected: pl.DataFrame
    num_rows: int
    num_source_rows: int
    num_clipped: int
    patients: tuple[str, ...]
    columns: Mapping[str, str]

    @classmethod
    def clean(cls, raw: RawRows, options: BuildOptions) -> Self:
        kept, rejected = clean(raw)
        num_clipped = 0
        if options.rules.ranges:
            kept, outside, num_clipped = apply_ranges(kept, options.rules.ranges)
            rejected = pl.concat([rejected, outside])
        num_source_rows = raw.rows.height if raw.num_source_rows is None else raw.num_source_rows
        return cls(kept, rejected, raw.rows.height, num_source_rows, num_clipped, raw.patients, raw.columns)


def _spill_parts(
    parts: Sequence[CleanedPart], piece: Piece, sites: Sequence[str], options: BuildOptions, stem: Path
) -> SpilledPiece:
    """Write a spill and its rejects, in the folders of ``stem`` under its name."""
    pseudonyms, files, work, name = options.pseudonyms, list(piece.files), stem.parent, stem.name
    kept, columns = _join_kept([part.kept for part in parts], piece.files[0])
    rejected = pl.concat([part.rejected for part in parts]).sort(FILE, ROW, maintain_order=True)
    examples = describe_rejects(rejected, parts[0].columns)
    others = pl.Series([patient for part in parts for patient in part.patients], dtype=pl.String)
    if pseudonyms is not None:  # files are often named like patients
        kept, rejected = pseudonyms.hide_kept(kept), pseudonyms.hide_rejected(rejected)
        others, files = pseudonyms.hide_names(others), [pseudonyms.hide(name) for name in files]
        sites = [pseudonyms.hide(site) for site in sites]
    only_rejected = to_patient_names(rejected[PATIENT_ID].unique()).drop_nulls()
    patients = list(dict.fromkeys([*names.list_present(kept[PATIENT_ID]), *only_rejected, *others]))
    hashes = options.split_rule.hash_patients(patients)[0]
    _write_spill(work / "spills" / name, kept, files, patients, hashes)
    if rejected.height:
        in_files = pl.Series(files, dtype=pl.String).gather(rejected["file"]).alias("file")
        table = rejected.with_columns(in_files).select(REJECTS_SCHEMA.names).to_arrow().cast(REJECTS_SCHEMA)
        write_parquet(work / "rejects" / f"{name}.parquet", REJECTS_SCHEMA, [table])
    return SpilledPiece(
        num_rows=sum(part.num_rows for part in parts),
        num_source_rows=sum(part.num_source_rows for part in parts),
        num_kept=kept.height,
        num_clipped=sum(part.num_clipped for part in parts),
        num_spills=1,
        rejects=dict(rejected["reason"].value_counts().iter_rows()),
        columns=columns,
        examples=examples,
        scales=measure_scales(kept, sites),
    )


def _join_kept(frames: Sequence[pl.DataFrame], file: str) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return kept rows as one frame, and their columns as :class:`SpilledPiece` has them."""
    present = [frame for frame in frames if frame.height] or [frames[0]]
    columns = _join_columns(file, [_describe_columns(frame) for frame in present])
    timed = next((frame for frame in present if frame[MINUTE].null_count() < frame.height), present[0])
    minute = timed.schema[MINUTE]
    if len(present) == 1:
        return present[0], columns
    named = [name for name in (PATIENT_ID, VARIABLE, SITE) if any(name in frame.columns for frame in present)]
    joined = [
        names.concat([frame[name] if name in frame.columns else names.nothing(name, frame.height) for frame in present])
        for name in named
    ]
    others = [frame.drop(named, strict=False).with_columns(_cast_static(frame[MINUTE], minute)) for frame in present]
    return pl.concat(others).with_columns(joined), columns


def _cast_static(minute: pl.Series, dtype: Any) -> pl.Series:
    """Return minutes as they are; a column without any, of static events, in the type of the other parts."""
    return minute if minute.dtype == dtype else pl.Series(MINUTE, [None] * len(minute), dtype=dtype)


def _describe_columns(kept: pl.DataFrame) -> dict[str, str]:
    is_static = kept[MINUTE].null_count() == kept.height
    names = [SET_INDEX] if is_static else [MINUTE, SET_INDEX]
    return {name: str(kept.schema[name]) for name in names if name in kept.columns}


def _join_columns(file: str, kinds: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the columns of all rows; raise UserError where a part has others."""
    joined: dict[str, str] = {}
    for columns in kinds:
        joined |= columns
    for columns in kinds:
        check_same_columns(file, columns, file, joined)
    return joined


def check_same_columns(file: str, columns: Mapping[str, str], other_file: str, others: Mapping[str, str]) -> None:
    """Raise UserError where files differ in their columns; static ones, without a minute, fit any."""
    if {MINUTE: others.get(MINUTE), **columns} != {MINUTE: columns.get(MINUTE), **others}:
        advice = "give minutes in all files or dates in all, and set indices in all or in none"
        raise UserError(f"{file} gives {dict(columns)}, {other_file} gives {dict(others)}; {advice}")


def _write_spill(
    stem: Path, kept: pl.DataFrame, files: list[str], patient_ids: list[str], hashes: npt.NDArray[np.uint64]
) -> None:
    """Write ``<stem>.events.arrow`` and ``<stem>.patients.arrow``; patients without a kept row are named too."""
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
    numbers = {name: kept[name] for name in (ROW, SET_INDEX) if name in kept.columns} | {MINUTE: minute}
    columns = {name: pa.array(column.to_numpy().take(order)) for name, column in numbers.items()}
    columns |= {
        VARIABLE: _to_dictionary(_find_positions(kept[VARIABLE], variables).take(order), variables),
        VALUE: kept[VALUE].to_arrow().take(order),
        FILE: _to_dictionary(kept[FILE].to_numpy().astype(np.int32).take(order), files),
    }
    write_table(stem.with_name(f"{stem.name}.events.arrow"), pa.table(columns), max_rows=BATCH_ROWS)
    counts = np.bincount(patient, minlength=len(patient_ids)).astype(np.int64)
    in_order = pa.array(patient_ids, pa.string()).take(by_hash)
    table = pa.table({PATIENT_ID: in_order, "hash": hashes[by_hash], "num_events": counts})
    write_table(stem.with_name(f"{stem.name}.patients.arrow"), table)


def _to_dictionary(positions: npt.NDArray[np.int32], texts: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(positions, pa.array(texts, pa.string()))


def _find_positions(
    column: pl.Series, texts: list[str], rank: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """Return [E] the position of each name among ``texts``, which hold them all, or the ``rank`` of that position."""
    assert isinstance(column.dtype, pl.Enum)
    found = pc.index_in(column.dtype.categories.to_arrow().cast(pa.string()), value_set=pa.array(texts, pa.string()))
    positions: npt.NDArray[np.int32] = found.fill_null(-1).to_numpy()  # a name without a kept row is never looked up
    of_names = positions if rank is None else rank[positions]
    return of_names.take(column.to_physical().to_numpy())


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionRows:
    """The kept rows of a partition's patients, each patient's in the order of pieces and rows."""

    patient_ids: list[str]  # in order, also of patients without a kept row
    variables: list[str]  # in order
    patient: npt.NDArray[np.int32]  # [E] position in patient_ids
    variable: npt.NDArray[np.int32]  # [E] position in variables
    table: pa.Table  # E rows of minute, value, file, row and perhaps set_index


def read_partition(folder: Path, num_spills: Sequence[int], partition: int, num_partitions: int) -> PartitionRows:
    """Return the rows of partition ``partition`` of ``num_partitions``, from the spills of all pieces."""
    names: list[pa.Array] = []
    counts: list[npt.NDArray[np.int64]] = []
    events: list[pa.Table] = []
    stems = [f"{piece:05d}.{spill:05d}" for piece, number in enumerate(num_spills) for spill in range(number)]
    for stem in stems:
        patients, previous = read_partition_slice(folder / f"{stem}.patients.arrow", partition, num_partitions)
        names.append(patients[PATIENT_ID])
        counts.append(patients["num_events"].to_numpy())
        start = int(previous["num_events"].to_numpy().sum())
        stop = start + int(counts[-1].sum())
        events.append(read_row_range(folder / f"{stem}.events.arrow", start, stop, BATCH_ROWS))
    variables = [part[VARIABLE].chunk(0) if part.num_rows else pa.array([], DICTIONARY) for part in events]
    patient_ids, ranks = _merge_names(names)
    variable_names, codes = _merge_names([part.dictionary for part in variables])
    return PartitionRows(
        patient_ids=patient_ids,
        variables=variable_names,
        patient=np.concatenate([np.repeat(rank, count) for rank, count in zip(ranks, counts, strict=True)]),
        variable=np.concatenate([code[part.indices.to_numpy()] for code, part in zip(codes, variables, strict=True)]),
        table=pa.concat_tables(part.drop_columns(VARIABLE) for part in _unify_minutes(events))
        .unify_dictionaries()
        .combine_chunks(),
    )


def _unify_minutes(parts: Sequence[pa.Table]) -> list[pa.Table]:
    """Return the rows of all spills; static ones have the type that the minutes of the others have."""
    present = [part for part in parts if part.num_rows] or list(parts[:1])
    dtypes = [part.schema.field(MINUTE).type for part in present]
    dtype = next((dtype for dtype in dtypes if pa.types.is_floating(dtype)), pa.int64())
    return [part.set_column(*_minutes_of(part, dtype)) for part in present]


def _minutes_of(part: pa.Table, dtype: pa.DataType) -> tuple[int, str, pa.Array]:
    column = part[MINUTE]
    static = pa.repeat(pa.scalar(-math.inf if pa.types.is_floating(dtype) else STATIC_INSTANT, dtype), part.num_rows)
    return part.schema.get_field_index(MINUTE), MINUTE, column if column.type == dtype else static


def _merge_names(parts: Sequence[pa.Array]) -> tuple[list[str], list[npt.NDArray[np.int32]]]:
    """Return all distinct names in order, and the positions among them of each part's names."""
    joined = pa.chunked_array(parts, pa.string())
    unique = joined.unique()
    merged = unique.take(pc.array_sort_indices(unique))
    position = pc.index_in(joined, value_set=merged)  # one table of texts for all parts
    return merged.to_pylist(), np.split(position.to_numpy(), np.cumsum([len(part) for part in parts])[:-1])
