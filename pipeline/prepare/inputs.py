"""Look at an input as a whole: its fingerprint, and the disk it needs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from pipeline.machine import usable_cores
from pipeline.prepare.executors import LOCAL, ONE_PROCESS, ExecutionOptions, open_executor, run_tasks
from pipeline.prepare.sources.reading import group_files, reading
from pipeline.prepare.sources.source import Source
from pipeline.schema import UserError
from pipeline.storage.files import file_sha256

NOTHING_KNOWN: Final[Mapping[str, str]] = MappingProxyType({})

WORK_BYTES: Final = {".parquet": 4.0, ".gz": 6.0}
"""Minimum number of bytes of disk for a byte of input; 1 for text.  A row takes 18 spilled, 10 sorted, 7 as Parquet."""


def compute_fingerprint(
    source: Source,
    options: Mapping[str, Any],
    execution: ExecutionOptions = ONE_PROCESS,
    checksums: Mapping[str, str] = NOTHING_KNOWN,
) -> str:
    """Return the sha256 of the options, and of the role, the place in the input and the content of all files read.

    Files are hashed by threads of this process, or, a group of them a task, by the workers of a cluster; but for those
    whose ``checksums`` are known, by their names among the inputs.
    """
    inputs = source.inputs()
    missing = [name for name in inputs if name not in checksums]
    pieces = group_files({name: _measure(inputs[name]) for name in missing})
    groups = [[inputs[name] for name in piece.files] for piece in pieces]
    if execution.executor == LOCAL:
        with ThreadPoolExecutor(usable_cores()) as threads:
            found = list(threads.map(_digest_files, groups))
    else:
        with open_executor(execution, max_workers=len(groups)) as executor:
            tasks = {number: (paths,) for number, paths in enumerate(groups)}
            found = [digests for _, digests in sorted(run_tasks(executor, "fingerprint", _digest_files, tasks))]
    known = {**checksums, **dict(zip(missing, chain.from_iterable(found), strict=True))}
    digests = sorted((name, known[name]) for name in inputs)
    return hashlib.sha256(json.dumps([options, digests], sort_keys=True).encode()).hexdigest()


def _measure(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def _digest_files(paths: Sequence[Path]) -> list[str]:
    return [_digest(path) for path in paths]


def _digest(path: Path) -> str:
    with reading(path):
        return file_sha256(path)


def check_disk_space(source: Source, output: Path) -> None:
    """Refuse at once what would fill the disk after hours; what passes may still do so, and can go on then."""
    needed = sum(path.stat().st_size * WORK_BYTES.get(path.suffix, 1.0) for path in source.inputs().values())
    free = shutil.disk_usage(output).free
    if needed > free:
        amounts = f"at least {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} are free"
        raise UserError(f"{output}: the work needs {amounts}; free some, or name an --output on another disk")
