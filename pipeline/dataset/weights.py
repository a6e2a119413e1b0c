"""Weights of samples: a table with a row a sample, or a row a patient, in proportion to which samples are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.arrays import Floats, Ints
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.samples import Samples
from pipeline.dataset.schemas import INDEX_SCHEMA
from pipeline.dataset.tables import JoinedRows
from pipeline.schema import INDEX_FILE, PREDICTION_MINUTE, PREDICTION_TIME, TIME_COLUMNS, Times, UserError
from pipeline.storage.files import file_sha256
from pipeline.storage.folder import Folder

WEIGHT = "weight"

_TYPES: dict[str, pa.DataType] = {
    "patient_id": pa.string(), WEIGHT: pa.float64(), PREDICTION_TIME: pa.timestamp("us", "UTC"),
    PREDICTION_MINUTE: pa.float64(),
}  # fmt: skip


class SampleWeights:
    """The weights that a CSV or Parquet file gives the samples of a data set.

    The file has the columns ``patient_id`` and ``weight`` (0 or more), and ``prediction_time`` or ``prediction_minute``
    where the samples of a patient have weights of their own; otherwise all of them have the patient's.

    Attributes:
        sha256: checksum of the file.
    """

    def __init__(self, path: Path, folder: Folder, manifest: Manifest, times: Times | None) -> None:
        """Read the file; UserError where it cannot be, a weight is missing, negative or infinite, or a row is double.

        ``times`` says what the prediction times of the samples are.
        """
        self._flag = f"--sampling_weights {path}"
        schema = pa.schema([INDEX_SCHEMA.field(name) for name in ("shard", "patient_id")])
        self._index = JoinedRows(folder, manifest.file(INDEX_FILE), schema)
        try:
            self.sha256 = file_sha256(path)
            table = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
            table = pa.table(
                {name: table[name].cast(kind) for name, kind in _TYPES.items() if name in table.schema.names}
            )
            self._weight, patient_id = table[WEIGHT].to_numpy(), table["patient_id"].combine_chunks()
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            needed = f"a CSV or Parquet file with columns patient_id and {WEIGHT}"
            raise UserError(f"{self._flag}: cannot be read ({str(error).splitlines()[0]}); give {needed}") from None
        if bad := np.count_nonzero(~((self._weight >= 0) & (self._weight < np.inf))) + patient_id.null_count:
            raise UserError(f"{self._flag}: {bad:,} rows lack a patient, or a weight of 0 or more; mend them")
        given = [name for name in TIME_COLUMNS.values() if name in table.schema.names]
        if given not in ([], [TIME_COLUMNS[times]] if times else []):
            column = f"{TIME_COLUMNS[times]}, or none" if times else "none"
            raise UserError(f"{self._flag}: column {given[0]} is not what the samples have; name times in {column}")
        self._patients = patient_id.unique()
        time = _comparable(table[given[0]].to_numpy()) if given else np.zeros(table.num_rows, np.int64)
        self._times = np.unique(time)
        self._has_times = bool(given)
        key = self._key(pc.index_in(patient_id, value_set=self._patients).to_numpy(), time)
        order = np.argsort(key, kind="stable")
        self._keys, self._weight = key[order], self._weight[order]
        if double := np.count_nonzero(np.diff(self._keys) == 0):
            raise UserError(f"{self._flag}: {double:,} samples stand twice; leave one row of each")

    def _key(self, patient: npt.NDArray[Any], time: npt.NDArray[Any]) -> Ints:
        """Return [N] one number for patient and time of each sample; below 0 where the file has no such."""
        place = np.minimum(np.searchsorted(self._times, time), len(self._times) - 1)
        known = (patient >= 0) & (self._times[place] == time)
        return np.where(known, patient.astype(np.int64) * len(self._times) + place, -1)

    def of(self, samples: Samples, entries: Sequence[ShardEntry]) -> Floats:
        """Return the weight [N] of the samples of some shards; UserError where one has none."""
        ids = self._index.read([entry.path for entry in entries])[0]["patient_id"].combine_chunks()
        row = pc.fill_null(pc.index_in(ids, value_set=self._patients), -1).to_numpy()
        time = np.zeros(len(samples.patient), np.int64)
        if self._has_times and samples.prediction_time is not None:
            time = _comparable(samples.prediction_time)
        key = self._key(row[samples.patient], time)
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        if missing := np.count_nonzero(self._keys[place] != key):
            advice = "give each one, 0 where it is never to be drawn"
            raise UserError(f"{self._flag}: {missing:,} of {len(key):,} samples have no weight; {advice}")
        return self._weight[place]


def _read_csv(path: Path) -> pa.Table:
    return pa_csv.read_csv(path, convert_options=pa_csv.ConvertOptions(column_types=_TYPES))


def _comparable(time: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return prediction times as numbers that equal themselves, also where there is none."""
    return time.astype("datetime64[us]").astype(np.int64) if time.dtype.kind == "M" else np.nan_to_num(time, nan=np.inf)
