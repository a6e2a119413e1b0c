"""Shards: how patients lie on disk, and the checks on the way back.

A Parquet shard has a row a patient (``SHARD_SCHEMA``), sorted by ``num_events``, in row groups of about
``ROW_GROUP_EVENTS`` events.  The lists of a row are slices of flat Arrow buffers: reading a shard gives flat arrays and
offsets, and touches no single patient.  A tar (``pipeline.dataset.tars``) is read to the same arrays, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.arrays import Floats, Ints, offsets_from_sizes
from pipeline.dataset.manifest import ShardEntry
from pipeline.dataset.schemas import SHARD_SCHEMA, TRAINED_SCHEMA
from pipeline.dataset.tables import read_parquet
from pipeline.dataset.tars import read_tar, write_tar
from pipeline.schema import UserError
from pipeline.storage.ahead import AheadFolder
from pipeline.storage.files import file_sha256, replace_atomically
from pipeline.storage.folder import BadFile, File, Folder, as_folder

ROW_GROUP_EVENTS = 1 << 17  # about: 1 MiB of codes and values, the minimum worth a read of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatPatients:
    """Patients as flat arrays and offsets; P patients, S sets, E events."""

    patient_offsets: Ints  # [P+1] into the sets
    set_offsets: Ints  # [S+1] into the events
    minute: npt.NDArray[np.float32]  # [S]; a static set has the minute of the patient's next set, 0 if there is none
    code: npt.NDArray[np.int32]  # [E]
    value: npt.NDArray[np.float32]  # [E], 0 where the event has no number
    has_value: npt.NDArray[np.bool_]  # [E]
    has_static: npt.NDArray[np.bool_]  # [P] whether a patient's first set is the static one
    patient_id: pa.StringArray  # [P]


def write_shard(table: pa.Table, directory: Path, path: str) -> ShardEntry:
    """Write ``table`` (``SHARD_SCHEMA``, sorted) to ``directory/path``, and return its entry for the manifest."""
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(target) as temporary:
        if target.suffix == ".tar":
            write_tar(table, temporary, target.stem)
        else:
            _write_row_groups(table, temporary)
    sizes = {name: int(np.sum(table[name].to_numpy(), dtype=np.int64)) for name in ("num_sets", "num_events")}
    sizes |= {"num_patients": table.num_rows, "num_bytes": target.stat().st_size}
    return ShardEntry(path=path, sha256=file_sha256(target), **sizes)


def _write_row_groups(table: pa.Table, path: Path) -> None:
    group = offsets_from_sizes(table["num_events"].to_numpy())[:-1] // ROW_GROUP_EVENTS
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [table.num_rows]])
    with pq.ParquetWriter(path, SHARD_SCHEMA, compression="zstd", version="2.6", write_statistics=True) as writer:
        for start, stop in itertools.pairwise(starts.tolist()):
            writer.write_table(table.slice(start, stop - start))


def check_shards(directory: Path | Folder, entries: Sequence[ShardEntry], *, fetch_ahead: int = 0) -> dict[str, str]:
    """Compare sizes and checksums of shards with the manifest, and return the reason why a shard is bad, by its path.

    Of a folder elsewhere up to ``fetch_ahead`` shards are fetched ahead.

    Raises:
        UserError: a shard cannot be read, which need not be its fault.
    """
    bad, shards = {}, [File(entry.path, entry.sha256, entry.num_bytes) for entry in entries]
    with closing(AheadFolder(as_folder(directory), fetch_ahead)) as files:
        files.announce(shards)
        for shard in shards:
            try:
                with files.local_file(shard):
                    pass
            except BadFile as error:
                bad[shard.name] = error.reason
    return bad


def read_shard(directory: Path | Folder, entry: ShardEntry, *, verify: bool = True) -> FlatPatients:
    """Return the patients of one shard of either format, in its order.

    With ``verify`` its size and checksum are compared with the manifest's; only a Folder remembers that they were.

    Raises:
        UserError: the file is missing, its checksum is not the manifest's, or its content contradicts itself.
    """
    folder = as_folder(directory)
    return _flatten(read_rows(folder, entry, TRAINED_SCHEMA, verify=verify), entry, *_locate(folder, entry))


def _locate(folder: Folder, entry: ShardEntry) -> tuple[str, str]:
    """Return the path of a shard, and what to do where it is damaged."""
    return f"{folder}/{entry.path}", f"the data set is damaged: {folder.repair_advice}"


def read_rows(folder: Folder, entry: ShardEntry, schema: pa.Schema, *, verify: bool = True) -> pa.Table:
    """Return the columns of ``schema``, some of ``SHARD_SCHEMA``, of one shard, each one array; raises as above."""
    path, advice = _locate(folder, entry)
    try:
        with folder.local_file(File(entry.path, entry.sha256, entry.num_bytes, verify)) as local:
            is_tar = entry.path.endswith(".tar")
            rows = read_tar(local).select(schema.names).cast(schema) if is_tar else read_parquet(local, schema)
            table = rows.combine_chunks()
    except BadFile as error:
        patients = f"its {entry.num_patients:,} patients"
        raise UserError(f"{error}, or leave out {patients} with --on_bad_shard quarantine") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); {advice}") from None
    if not table.num_rows:
        raise UserError(f"{path}: holds no patients; {advice}")
    return table


def _flatten(table: pa.Table, entry: ShardEntry, path: str, advice: str) -> FlatPatients:
    """Return the rows of a shard as flat arrays, which are compared with its entry."""
    columns = {name: table[name].chunk(0) for name in TRAINED_SCHEMA.names}
    if entry.data_set:
        columns["patient_id"] = pc.binary_join_element_wise(entry.data_set, columns["patient_id"], "")
    flat = {name: columns[name].flatten() for name in ("minute", "set_size", "code", "value")}
    set_size = flat["set_size"].to_numpy()
    patient_offsets = offsets_from_sizes(columns["num_sets"].to_numpy())
    given_minute = flat["minute"].to_numpy(zero_copy_only=False)
    minute = _fill_static_minutes(given_minute, patient_offsets)
    patients = FlatPatients(
        patient_offsets=patient_offsets,
        set_offsets=offsets_from_sizes(set_size),
        minute=minute.astype(np.float32),
        code=flat["code"].to_numpy(),
        value=pc.fill_null(flat["value"], 0.0).to_numpy(),
        has_value=pc.is_valid(flat["value"]).to_numpy(zero_copy_only=False),
        has_static=np.isnan(given_minute[np.minimum(patient_offsets[:-1], len(given_minute) - 1)]),
        patient_id=columns["patient_id"],
    )
    sizes = (len(patients.patient_id), len(patients.minute), len(patients.code), len(patients.value))
    expected = (entry.num_patients, entry.num_sets, entry.num_events, entry.num_events)
    ends = (patients.patient_offsets[-1], patients.set_offsets[-1])
    if sizes != expected or ends != (entry.num_sets, entry.num_events) or set_size.min() < 1:
        raise UserError(f"{path}: {sizes} patients, sets, events and values, the manifest says {expected}; {advice}")
    return patients


def _fill_static_minutes(minute: Floats, patient_offsets: Ints) -> Floats:
    """Return the minutes [S] with one for each static set (NaN), which can only be a patient's first."""
    static, filled = np.flatnonzero(np.isnan(minute)), minute.copy()
    is_only_set = np.isin(static + 1, patient_offsets)
    filled[static] = np.where(is_only_set, 0.0, minute[np.minimum(static + 1, len(minute) - 1)])
    return filled
