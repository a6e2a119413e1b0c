"""A task over simulated shards, its table real row by row, and a slow store of it.

Samples are at even steps of each patient's sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import TASK_SCHEMA
from pipeline.dataset.tasks import SampleCounts, Task
from pipeline.prepare.tasks import write_task_table
from pipeline.storage.folder import Folder
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.remote import open_folder

NAME = "hourly"
SHARDS_AT_ONCE = 20

Lengths: TypeAlias = Callable[[int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def samples_of(shard: int, path: str, lengths: Lengths, samples_per_patient: int) -> pl.DataFrame:
    """Return the samples of one shard, as the table of a task has them.

    Set ``s`` of a patient is at minute ``30 s``, and sizes of sets differ by 1 at most, the larger ones first.
    """
    num_events, num_sets = lengths(shard)
    patient = np.repeat(np.arange(len(num_events)), samples_per_patient)
    share = np.tile(np.arange(1, samples_per_patient + 1), len(num_events))
    whole, events = num_sets[patient], num_events[patient]
    seen = -(-whole * share // samples_per_patient)
    ids = pl.Series([f"{shard}-{row}" for row in range(len(num_events))])
    return pl.DataFrame(
        {
            "patient_id": ids.gather(pl.Series(patient)),
            "split": pl.repeat("train", len(patient), eager=True),
            "shard": pl.repeat(path, len(patient), eager=True),
            "position": patient.astype(np.int32),
            "prediction_time": pl.repeat(None, len(patient), eager=True, dtype=pl.Datetime("us")),
            "prediction_minute": (30.0 * (seen - 1)),
            "label": np.random.default_rng([2, shard]).integers(0, 2, len(patient), np.int8),
            "num_events": (events // whole * seen + np.minimum(seen, events % whole)).astype(np.int32),
            "num_sets": seen.astype(np.int32),
            "whole_sets": np.ones(len(patient), np.bool_),
        }
    )


def write_samples(directory: Path, manifest: Manifest, lengths: Lengths, samples_per_patient: int) -> Task:
    """Write the task ``NAME`` over the shards of a manifest, of which shard ``i`` has patients of ``lengths(i)``."""
    entries = manifest.splits["train"]
    num_samples = samples_per_patient * sum(entry.num_patients for entry in entries)
    num_positive = 0

    def make_slices() -> Iterator[pl.DataFrame]:
        nonlocal num_positive
        for start in range(0, len(entries), SHARDS_AT_ONCE):
            some: Iterable[int] = range(start, min(start + SHARDS_AT_ONCE, len(entries)))
            frame = pl.concat([samples_of(i, entries[i].path, lengths, samples_per_patient) for i in some])
            num_positive += int(frame["label"].sum())
            yield frame

    table_sha256, table_pieces = write_task_table(directory, NAME, make_slices(), TASK_SCHEMA)
    task = Task(
        name=NAME,
        kind="binary",
        classes=("0", "1"),
        data=manifest.fingerprint,
        table_sha256=table_sha256,
        table_pieces=table_pieces,
        times="minute",
        splits={
            "train": SampleCounts(
                num_samples=num_samples,
                num_patients=sum(entry.num_patients for entry in entries),
                num_labelled=num_samples,
                class_counts=[num_samples - num_positive, num_positive],
            )
        },
        shards={entry.path: samples_per_patient * entry.num_patients for entry in entries},
        excluded_codes=[],
        labels_from="drawn",
        labels_without_patient=0,
    )
    task.save(directory)
    return task


@dataclass
class Store:
    """The folder as a store: a request takes ``delay`` seconds and its bytes at ``rate`` bytes/s."""

    delay: float
    rate: float
    requests: int = 0
    num_bytes: int = 0

    def open(self, directory: Path) -> Folder:
        """Return the folder at a URL, with an empty cache; requests of this process are slow from now on."""
        for name in ("read", "read_range"):
            setattr(ObjectStore, name, self._slow_down(getattr(ObjectStore, name)))
        return open_folder(f"file://{directory}", cache_dir=directory / "cache")

    def _slow_down(self, read: Any) -> Any:
        def read_slowly(*given: Any) -> bytes:
            content: bytes = read(*given)
            self.requests += 1
            self.num_bytes += len(content)
            time.sleep(self.delay + len(content) / self.rate)
            return content

        return read_slowly


def forget_pieces(directory: Path) -> None:
    """Take the checksums of pieces from the task."""
    replace(Task.load(directory, Manifest.load(directory), NAME), table_pieces=None).save(directory)
