"""Read and clean a piece of the input, and spill its kept rows to disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import polars as pl

from pipeline.prepare import names
from pipeline.prepare.arrow_files import write_parquet
from pipeline.prepare.clean import REJECTS_SCHEMA, clean, describe_rejects
from pipeline.prepare.columns import to_patient_names
from pipeline.prepare.gather import SCALES, locate
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.rules import apply_ranges
from pipeline.prepare.scales import Scale, measure_scales, pick_extremes, save_scales
from pipeline.prepare.sources.reading import FILE, ROW, SITE, Piece
from pipeline.prepare.sources.source import RawRows, Source
from pipeline.prepare.spill_files import write_spill
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, VARIABLE, UserError

COUNTS: Final = ("num_rows", "num_source_rows", "num_kept", "num_clipped", "num_spills")

SPILL_ROWS: Final = 1 << 20
"""Minimum number of rows of a spill, but for the last one of a piece."""


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


def spill_piece(source: Source, piece: Piece, number: int, options: BuildOptions, work: Path) -> SpilledPiece:
    """Read and clean a piece; its kept rows go to ``spills/``, the others to ``rejects/``, scales to ``scales/``."""
    found: list[tuple[SpilledPiece, list[Scale]]] = []
    parts: list[CleanedPart] = []
    sites = [source.name_site(name) for name in piece.files]
    for raw in source.read(piece):
        parts.append(CleanedPart.clean(raw, options))
        if sum(part.num_rows for part in parts) >= SPILL_ROWS:
            found.append(_spill_parts(parts, piece, sites, options, work, (number, len(found))))
            parts = []
    if parts or not found:
        found.append(_spill_parts(parts, piece, sites, options, work, (number, len(found))))
    spills = [spilled for spilled, _ in found]
    save_scales(pick_extremes(scale for _, scales in found for scale in scales), locate(work, SCALES, number))
    kinds = [spill.columns for spill in spills if spill.num_kept]
    return SpilledPiece(
        **{name: sum(getattr(spill, name) for spill in spills) for name in COUNTS},
        rejects=dict(sum((Counter(spill.rejects) for spill in spills), Counter[str]())),
        columns=_join_columns(piece.files[0], kinds),
        examples={reason: text for spill in reversed(spills) for reason, text in spill.examples.items()},
    )


def list_spills(pieces: Sequence[SpilledPiece]) -> list[str]:
    """Return the paths of all spills in order, below the work folder."""
    return [_name_spill(at, number) for at, piece in enumerate(pieces) for number in range(piece.num_spills)]


def _name_spill(piece: int, number: int) -> str:
    return f"spills/{piece:05d}.{number:05d}.columns"


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
    parts: Sequence[CleanedPart],
    piece: Piece,
    sites: Sequence[str],
    options: BuildOptions,
    work: Path,
    number: tuple[int, int],
) -> tuple[SpilledPiece, list[Scale]]:
    """Write a spill and its rejects; ``number`` is that of the piece, and that of the spill among the piece's."""
    pseudonyms, files = options.pseudonyms, list(piece.files)
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
    write_spill(work / _name_spill(*number), kept, files, patients, hashes)
    if rejected.height:
        in_files = pl.Series(files, dtype=pl.String).gather(rejected["file"]).alias("file")
        table = rejected.with_columns(in_files).select(REJECTS_SCHEMA.names).to_arrow().cast(REJECTS_SCHEMA)
        path = work / f"rejects/{number[0]:05d}.{number[1]:05d}.parquet"
        write_parquet(path, REJECTS_SCHEMA, [table], is_synced=False)
    spilled = SpilledPiece(
        num_rows=sum(part.num_rows for part in parts),
        num_source_rows=sum(part.num_source_rows for part in parts),
        num_kept=kept.height,
        num_clipped=sum(part.num_clipped for part in parts),
        num_spills=1,
        rejects=dict(rejected["reason"].value_counts().iter_rows()),
        columns=columns,
        examples=examples,
    )
    return spilled, measure_scales(kept, sites)


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
