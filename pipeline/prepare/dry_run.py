"""Say what preparing an input would do, from a sample of it, and write nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import polars as pl

from pipeline.prepare.clean import describe_reasons, describe_rejects
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.scales import Scale, measure_scales
from pipeline.prepare.sources.reading import Piece, group_files
from pipeline.prepare.sources.source import Source
from pipeline.prepare.spill import CleanedPart
from pipeline.prepare.warn import warn_of_scales

MAX_FILES: Final = 1000
"""Maximum number of files of which the beginning is read; of more, every second, third … one."""

SAMPLE_BYTES: Final = 1 << 26
"""Approximate bytes of all beginnings together."""

LATER_STAGES: Final = 1.5
"""Approximate time of the stages that sort and write, to that of reading and cleaning."""

WORK_BYTES_A_ROW: Final = 43
"""Bytes of disk that a row takes while it is worked on: 28 spilled, 10 sorted, 5 as Parquet."""


def plan_work(source: Source, options: BuildOptions, *, num_workers: int) -> list[str]:
    """Return in words what is recognised in an input, what a sample of it becomes, and how much work it will be.

    Raises:
        UserError: the input cannot be used, as in the work itself.
    """
    lines, pieces = source.describe(), source.pieces()
    files = source.find_events()
    sampled = list(files)[:: max(1, -(-len(files) // MAX_FILES))]
    rejects: Counter[str] = Counter()
    examples: dict[str, str] = {}
    variables: set[str] = set()
    scales: list[Scale] = []
    num_rows = num_kept = 0
    total_rows = 0.0
    started = time.monotonic()
    for piece, share in _list_samples(source, files, sampled) if files else [(pieces[0], 1 / len(pieces))]:
        for raw in source.read(piece):
            part = CleanedPart.clean(raw, options)
            num_rows, num_kept = num_rows + part.num_rows, num_kept + part.kept.height
            total_rows += part.num_rows / share
            rejects.update(part.rejected["reason"].to_list())
            examples = describe_rejects(part.rejected, part.columns) | examples
            variables.update(part.kept["variable"].unique().cast(pl.String).to_list())
            scales += measure_scales(part.kept, [source.name_site(name) for name in piece.files])
    seconds = time.monotonic() - started
    total_rows *= len(files) / max(1, len(sampled)) if files else 1
    beginnings = f"the beginnings of {len(sampled):,} of {len(files):,} files" if files else "the first piece"
    lines.append(f"sample: {num_rows:,} rows of {beginnings}, {num_kept:,} kept")
    lines.append(f"sample: rejected: {describe_reasons(rejects, examples) or 'none'}")
    lines.append(f"sample: {len(variables):,} variables, such as {', '.join(sorted(variables)[:8])}")
    lines += [f"sample: warning: {warning}" for warning in warn_of_scales(scales)]
    minutes = seconds * total_rows / max(1, num_rows) * (1 + LATER_STAGES) / min(num_workers, len(pieces)) / 60
    disk = total_rows * WORK_BYTES_A_ROW / 2**30
    estimate = f"about {total_rows:,.0f} rows, {disk:.1f} GiB of disk and {minutes:.1f} minutes"
    lines.append(f"the work: {len(pieces):,} pieces, {estimate} with {num_workers} workers; a packed file may be more")
    return lines


def _list_samples(source: Source, files: Mapping[str, Path], sampled: Sequence[str]) -> Iterator[tuple[Piece, float]]:
    """Yield the beginnings of files and their shares of them; files that are read whole are read together."""
    num_bytes = max(1 << 16, SAMPLE_BYTES // len(sampled))
    whole: dict[str, int] = {}
    for name in sampled:
        piece, share = source.sample(name, files[name], num_bytes)
        if piece == Piece(files=(name,)):
            whole[name] = files[name].stat().st_size
        else:
            yield piece, share
    yield from ((piece, 1.0) for piece in group_files(whole))
