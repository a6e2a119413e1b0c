"""Say what preparing an input would do, from a sample of it, and write nothing."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from typing import Final

import polars as pl

from pipeline.prepare.clean import describe_reasons, describe_rejects
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.sources.source import Source
from pipeline.prepare.spill import CleanedPart

MAX_SAMPLED: Final = 8
"""Maximum number of pieces of which the first part is read."""

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
    step = max(1, -(-len(pieces) // MAX_SAMPLED))
    sampled = pieces[::step]
    rejects: Counter[str] = Counter()
    examples: dict[str, str] = {}
    variables: set[str] = set()
    num_rows = num_kept = 0
    started = time.monotonic()
    for piece in sampled:
        for raw in islice(source.read(piece), 1):
            part = CleanedPart.clean(raw, options)
            num_rows, num_kept = num_rows + part.num_rows, num_kept + part.kept.height
            rejects.update(part.rejected["reason"].to_list())
            examples = describe_rejects(part.rejected, part.columns) | examples
            variables.update(part.kept["variable"].unique().cast(pl.String).to_list())
    seconds = time.monotonic() - started
    share = len(pieces) / len(sampled)
    lines.append(f"sample: {num_rows:,} rows of {len(sampled):,} of {len(pieces):,} pieces, {num_kept:,} kept")
    lines.append(f"sample: rejected: {describe_reasons(rejects, examples) or 'none'}")
    lines.append(f"sample: {len(variables):,} variables, such as {', '.join(sorted(variables)[:8])}")
    minutes = seconds * share * (1 + LATER_STAGES) / min(num_workers, len(pieces)) / 60
    disk = num_rows * share * WORK_BYTES_A_ROW / 2**30
    estimate = f"about {num_rows * share:,.0f} rows, {disk:.1f} GiB of disk and {minutes:.1f} minutes"
    lines.append(f"the work: {len(pieces):,} pieces, {estimate} with {num_workers} workers; a packed file may be more")
    return lines
