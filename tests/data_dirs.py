"""Tiny data directories, written through ``pipeline.dataset.shards`` alone, and what a batch of them must hold.

The reference is as naive as it can be: loops over patients, sets and events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SCHEMA, TASK_SCHEMA, VOCABULARY_SCHEMA
from pipeline.dataset.shards import write_shard
from pipeline.dataset.tasks import SampleCounts, Task
from pipeline.schema import FIRST_CODE, INDEX_FILE, UNLABELLED, VOCABULARY_FILE
from pipeline.storage.files import file_sha256
from pipeline.storage.pieces import Pieces

NUM_CODES = 12


@dataclass(frozen=True, kw_only=True)
class Patient:
    """A patient in full: ``sets`` of (minute, events), an event being (code, value or None)."""

    patient_id: str
    label: int | None
    sets: list[tuple[float, list[tuple[int, float | None]]]]
    prediction_time: float | None = None

    @property
    def num_events(self) -> int:
        return sum(len(events) for _, events in self.sets)

    @property
    def num_sets(self) -> int:
        return len(self.sets)

    def kept(self, first: int, count: int) -> Patient:
        """The patient with ``count`` events from event ``first`` on, and the sets that still have events."""
        sets, seen = [], 0
        for minute, events in self.sets:
            kept = [event for place, event in enumerate(events, seen) if first <= place < first + count]
            seen += len(events)
            if kept:
                sets.append((minute, kept))
        return replace(self, sets=sets)

    def until(self, minute: float, label: int | None) -> Patient:
        """The sample of the patient at ``minute``, that minute included."""
        return replace(
            self, label=label, sets=[each for each in self.sets if each[0] <= minute], prediction_time=minute
        )


def make_patients(set_sizes: Sequence[Sequence[int]], *, seed: int = 0, prefix: str = "p") -> list[Patient]:
    """A patient for each item, with sets of the given sizes; codes, values, minutes and labels at random."""
    rng = np.random.default_rng(seed)
    patients = []
    for number, sizes in enumerate(set_sizes):
        minutes = np.sort(rng.choice(3000, len(sizes), replace=False)) - 10.5
        sets = [
            (
                float(minute),
                [
                    (int(rng.integers(FIRST_CODE, NUM_CODES)), None if rng.random() < 0.2 else float(rng.normal()))
                    for _ in range(size)
                ],
            )
            for minute, size in zip(minutes, sizes, strict=True)
        ]
        label = (0, 1, None)[int(rng.integers(3))]
        patients.append(Patient(patient_id=f"{prefix}{number}/ü", label=label, sets=sets))
    return patients


def write_data_dir(
    directory: Path,
    splits: Mapping[str, Sequence[Patient]],
    *,
    shard_size: int = 5,
    suffix: str = ".parquet",
    dealt: bool = False,
    num_codes: int = NUM_CODES,
    keep_order: bool = False,
) -> Path:
    """Write a complete data directory; each split's patients stand in order of ``num_events``, or, ``dealt``, only
    those of a shard, and shards are alike, as partitions by a hash are; or they stand as they come (``keep_order``).
    Its task ``default`` has their labels.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries: dict[str, list[Any]] = {}
    index_rows = []
    for split, patients in splits.items():
        entries[split] = []
        ordered = patients if keep_order else in_stored_order(patients)
        starts = range(0, len(ordered), shard_size)
        for number, first in enumerate(starts):
            shard = ordered[number :: len(starts)] if dealt else ordered[first : first + shard_size]
            path = f"{split}/{number:05d}{suffix}"
            entries[split].append(write_shard(shard_table(shard), directory, path))
            index_rows += [_index_row(split, path, position, patient) for position, patient in enumerate(shard)]
    pq.write_table(pa.Table.from_pylist(index_rows, INDEX_SCHEMA), directory / INDEX_FILE)
    vocabulary = [
        {"code": code, "variable": f"v{code}", "count": 1, "mean": 0.0, "std": 1.0} for code in range(num_codes)
    ]
    pq.write_table(pa.Table.from_pylist(vocabulary, VOCABULARY_SCHEMA), directory / VOCABULARY_FILE)
    files = {name: file_sha256(directory / name) for name in (INDEX_FILE, VOCABULARY_FILE)}
    manifest = Manifest(
        splits=entries,
        files=files,
        vocabulary_fingerprint=files[VOCABULARY_FILE],
        num_codes=num_codes,
        embedding_dim=None,
        options={},
        fingerprint=hashlib.sha256("".join(files.values()).encode()).hexdigest(),
    )
    manifest.save(directory)
    _write_whole_patients(directory, manifest, splits, index_rows)
    return directory


def _write_whole_patients(
    directory: Path, manifest: Manifest, splits: Mapping[str, Sequence[Patient]], index_rows: list[dict[str, Any]]
) -> None:
    """Write the task ``default``, whose samples are whole patients, with pyarrow alone."""
    labels = {patient.patient_id: patient.label for patients in splits.values() for patient in patients}
    times = {"prediction_time": None, "prediction_minute": None, "whole_sets": True}
    rows = [row | times | {"label": labels[row["patient_id"]]} for row in index_rows]
    rows = [{name: row[name] for name in TASK_SCHEMA.names} for row in rows]
    (directory / "tasks").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, TASK_SCHEMA), directory / "tasks" / "default.parquet")
    counts = {
        split: SampleCounts(
            num_samples=len(patients),
            num_patients=len(patients),
            num_labelled=sum(patient.label is not None for patient in patients),
            class_counts=[sum(patient.label == label for patient in patients) for label in (0, 1)],
        )
        for split, patients in splits.items()
    }
    Task(
        name="default",
        kind="binary",
        classes=("0", "1"),
        data=manifest.fingerprint,
        table_sha256=file_sha256(directory / "tasks" / "default.parquet"),
        times=None,
        splits=counts,
        shards={entry.path: entry.num_patients for entry in manifest.all_shards()},
        excluded_codes=[],
        labels_from="labels.csv",
        labels_without_patient=0,
    ).save(directory)


def add_task(
    directory: Path, samples: Sequence[tuple[Patient, float | None, int | None]], name: str = "default"
) -> Task:
    """Add a task of samples: a patient, a prediction minute and a label each."""
    import polars as pl  # preparation alone needs it; training on a GPU runs without

    from pipeline.prepare.sources.labels import Labels
    from pipeline.prepare.tasks import write_task

    columns = {
        "patient_id": pl.Series([patient.patient_id for patient, *_ in samples], dtype=pl.String),
        "label": pl.Series([label for *_, label in samples], dtype=pl.Int8),
    }
    if any(minute is not None for _, minute, _ in samples):
        columns["prediction_minute"] = pl.Series([minute for _, minute, _ in samples], dtype=pl.Float64)
    return write_task(directory, Manifest.load(directory), name, Labels.of_frame("labels.csv", pl.DataFrame(columns)))


def rewrite_task(directory: Path, *, row_group_size: int, piece_bytes: int | None, name: str = "default") -> Task:
    """Write the table of a task again, in row groups and pieces of other sizes; None = without pieces."""
    task = Task.load(directory, Manifest.load(directory), name)
    path = directory / task.table().name
    pq.write_table(pq.read_table(path), path, row_group_size=row_group_size)
    pieces = None if piece_bytes is None else pieces_of(path.read_bytes(), piece_bytes)
    task = replace(task, table_sha256=file_sha256(path), table_pieces=pieces)
    task.save(directory)
    return task


def pieces_of(content: bytes, piece_bytes: int) -> Pieces:
    """The pieces of a file of this content."""
    parts = [content[start : start + piece_bytes] for start in range(0, len(content), piece_bytes)]
    sha256 = tuple(hashlib.sha256(part).hexdigest() for part in parts)
    return Pieces(num_bytes=len(content), piece_bytes=piece_bytes, sha256=sha256)


def in_stored_order(patients: Sequence[Patient]) -> list[Patient]:
    """Patients as :func:`write_data_dir` stores them, and the loader counts them."""
    return sorted(patients, key=lambda patient: patient.num_events)


def expected_batch(patients: Sequence[Patient]) -> dict[str, list[Any]]:
    """The fields of ``PatientBatch`` for ``patients``, as lists."""
    batch: dict[str, list[Any]] = {
        "code": [], "value": [], "has_value": [], "set_offsets": [0], "minute": [], "patient_offsets": [0],
        "label": [], "patient_id": [],
    }  # fmt: skip
    for patient in patients:
        for minute, events in patient.sets:
            for code, value in events:
                batch["code"].append(code)
                batch["value"].append(0.0 if value is None else float(np.float32(value)))
                batch["has_value"].append(value is not None)
            batch["set_offsets"].append(len(batch["code"]))
            batch["minute"].append(minute)
        batch["patient_offsets"].append(len(batch["minute"]))
        batch["label"].append(UNLABELLED if patient.label is None else patient.label)
        batch["patient_id"].append(patient.patient_id)
    return batch


def shard_table(patients: Sequence[Patient]) -> pa.Table:
    rows = [
        {
            "patient_id": patient.patient_id,
            "num_events": patient.num_events,
            "num_sets": patient.num_sets,
            "minute": [minute for minute, _ in patient.sets],
            "set_size": [len(events) for _, events in patient.sets],
            "code": [code for _, events in patient.sets for code, _ in events],
            "value": [value for _, events in patient.sets for _, value in events],
        }
        for patient in patients
    ]
    return pa.Table.from_pylist(rows, SHARD_SCHEMA)


def _index_row(split: str, path: str, position: int, patient: Patient) -> dict[str, Any]:
    return {
        "patient_id": patient.patient_id,
        "split": split,
        "shard": path,
        "position": position,
        "num_events": patient.num_events,
        "num_sets": patient.num_sets,
        "max_set_size": max(len(events) for _, events in patient.sets),
    }
