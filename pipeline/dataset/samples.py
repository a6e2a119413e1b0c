"""Samples: what a plan is made of.  A sample is a whole patient, or a patient's events up to a prediction time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import Ints, offsets_from_sizes
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.schemas import INDEX_SCHEMA, TASK_SCHEMA
from pipeline.dataset.tables import RowsByShard
from pipeline.dataset.tasks import Task
from pipeline.schema import INDEX_FILE, PREDICTION_MINUTE, PREDICTION_TIME, UNLABELLED, UserError
from pipeline.storage.folder import Folder

_LENGTHS = pa.schema([INDEX_SCHEMA.field(name) for name in ("shard", "num_events", "num_sets")])
_SAMPLES = pa.schema([field for field in TASK_SCHEMA if field.name not in ("patient_id", "split")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The samples [N] of some shards that have events, in the order of the shards and of their rows.

    Attributes:
        patient: [N] the patient of each, as its row in these shards, one after another.
        num_events: [N] events up to the prediction time, at least 1.
        num_sets: [N] sets of these events.
        label: [N], -1 = unlabelled.
        prediction_time: [N] datetime64[us], or float64 minutes; NaT or NaN = the whole patient.  None = all are whole.
    """

    patient: Ints
    num_events: Ints
    num_sets: Ints
    label: Ints
    prediction_time: npt.NDArray[Any] | None = None


class SampleIndex:
    """The samples of a data set, read for some shards at a time: those of a task, or without one the patients."""

    def __init__(self, folder: Folder, manifest: Manifest, task: Task | None, *, verify: bool = True) -> None:
        self.task = task
        self._name = INDEX_FILE if task is None else task.table
        self._advice = folder.repair_advice if task is None else "add the task again"
        self._where = f"{folder}/{self._name}"
        sha256 = manifest.files.get(INDEX_FILE) if task is None else task.table_sha256
        if sha256 is None:
            raise UserError(f"{self._where}: not in the manifest; run preprocess.py again")
        self._rows = RowsByShard(folder, self._name, sha256, _LENGTHS if task is None else _SAMPLES, verify=verify)

    def count(self, entry: ShardEntry) -> int:
        """Return the number of samples of a shard, without reading anything."""
        return entry.num_patients if self.task is None else self.task.shards.get(entry.path, 0)

    def read(self, entries: Sequence[ShardEntry]) -> Samples:
        """Return the samples of some shards."""
        table, shard = self._rows.read([entry.path for entry in entries])
        if self.task is not None:
            has_events = pc.greater(table["num_events"], 0)
            table, shard = table.filter(has_events), shard[has_events.to_numpy()]
        num_events, num_sets = (table[name].to_numpy().astype(np.int64) for name in ("num_events", "num_sets"))
        samples = (self._as_samples if self.task else _as_patients)(table, shard, entries, num_events, num_sets)
        counts = np.bincount(shard, minlength=len(entries)).tolist()
        patients = offsets_from_sizes(np.array([entry.num_patients for entry in entries], np.int64))
        inside = (samples.patient >= patients[shard]) & (samples.patient < patients[shard + 1])
        lengths_fit = (num_sets >= 1) & (num_sets <= num_events)
        if counts != [self.count(entry) for entry in entries] or not (inside & lengths_fit).all():
            raise self._contradiction()
        if self.task is None:
            sums = [np.bincount(shard, amount, len(entries)).tolist() for amount in (num_sets, num_events)]
            if sums != [[entry.num_sets for entry in entries], [entry.num_events for entry in entries]]:
                raise self._contradiction()
        return samples

    def _contradiction(self) -> UserError:
        return UserError(f"{self._where}: contradicts the manifest; {self._advice}")

    def _as_samples(
        self, table: pa.Table, shard: Ints, entries: Sequence[ShardEntry], num_events: Ints, num_sets: Ints
    ) -> Samples:
        assert self.task is not None
        first = offsets_from_sizes(np.array([entry.num_patients for entry in entries], np.int64))
        label = pc.fill_null(table["label"].cast(pa.int64()), UNLABELLED).to_numpy()
        columns = {"date": PREDICTION_TIME, "minute": PREDICTION_MINUTE}
        time = table[columns[self.task.times]].to_numpy() if self.task.times else None
        return Samples(
            patient=first[shard] + table["position"].to_numpy(),
            num_events=num_events,
            num_sets=num_sets,
            label=label,
            prediction_time=time,
        )


def _as_patients(
    table: pa.Table, shard: Ints, entries: Sequence[ShardEntry], num_events: Ints, num_sets: Ints
) -> Samples:
    label = np.full(table.num_rows, UNLABELLED, np.int64)
    return Samples(patient=np.arange(table.num_rows), num_events=num_events, num_sets=num_sets, label=label)
