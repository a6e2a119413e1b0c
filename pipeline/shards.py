"""Shards, index, vocabulary and manifest: how patients lie on disk, and the checks on the way back.

A Parquet shard has a row a patient (``SHARD_SCHEMA``), sorted by ``num_events``, in row groups of about
``ROW_GROUP_EVENTS`` events, so that a range of lengths is a range of row groups.  The lists of a row are slices
of flat Arrow buffers: reading a shard gives flat arrays and offsets, and touches no single patient.

A WebDataset shard (``pipeline.tars``) holds the same rows as a tar; both are read to the same arrays, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.flat import offsets_of
from pipeline.folder import BadFile, Folder, file_sha256, folder_at
from pipeline.schema import (
    EMBEDDINGS_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    SPLITS,
    UNLABELLED,
    VOCABULARY_FILE,
    UserError,
)
from pipeline.tars import read_tar, write_tar

SHARD_SUFFIXES: Final = {"parquet": (".parquet",), "webdataset": (".tar",), "both": (".parquet", ".tar")}
"""Files of a shard by ``--shard_format``; the first is the one that training reads."""

_SHARD_PATH: Final = re.compile(rf"({'|'.join(SPLITS)})/[0-9]+\.(parquet|tar)")
"""Nothing else is opened, or removed, because a manifest names it."""

MOST_OF_A_SHARD: Final = 1 << 31
"""Patients, sets and events are counted in 32 bits."""

PATIENTS_A_BYTE: Final = 64
"""More than any compression fits; memory for lengths is taken before a shard is read."""

TEMPORARY: Final = ".tmp"
"""Ends the names of files that are not complete."""

ROW_GROUP_EVENTS = 1 << 17
"""About how many events share a row group: 1 MiB of codes and values, the least worth a read of its own."""

SHARD_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("label", pa.int8()),  # null = unlabelled
        pa.field("num_events", pa.int32(), nullable=False),
        pa.field("num_sets", pa.int32(), nullable=False),
        pa.field("minute", pa.list_(pa.field("item", pa.float64())), nullable=False),  # a set; null = the static set
        pa.field("set_size", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # a set
        pa.field("code", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # an event
        pa.field("value", pa.list_(pa.field("item", pa.float32())), nullable=False),  # an event; null = no number
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int8()),
        pa.field("shard", pa.string(), nullable=False),  # path below the data directory
        pa.field("position", pa.int32(), nullable=False),  # row of the shard
        pa.field("num_events", pa.int32(), nullable=False),
        pa.field("num_sets", pa.int32(), nullable=False),
        pa.field("max_set_size", pa.int32(), nullable=False),
    ]
)

VOCABULARY_SCHEMA = pa.schema(
    [
        pa.field("code", pa.int32(), nullable=False),
        pa.field("variable", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("std", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),  # outliers are below low or above high; null where there is no such rule
        pa.field("high", pa.float64()),
        pa.field("description", pa.string()),  # null where the input has none
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard, as the manifest names it."""

    path: str
    num_patients: int
    num_sets: int
    num_events: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a data directory holds.  Written last: where it is, everything it names was complete.

    Attributes:
        splits: the shards of each split, as training reads them.
        tars: the same shards again as WebDataset tars, where both formats were asked for.
        files: sha256 of every other file that training reads, by name.
        vocabulary_fingerprint: sha256 over names, means and stds; a checkpoint carries it and refuses another.
        num_codes: rows of the vocabulary, padding and unknown included.
        embedding_dim: width of ``embeddings.npy``, or null where the data has none.
        options: what preprocess was asked, resolved.
        fingerprint: sha256 over input and options.
    """

    splits: dict[str, list[ShardEntry]]
    files: dict[str, str]
    vocabulary_fingerprint: str
    num_codes: int
    embedding_dim: int | None
    options: dict[str, Any]
    fingerprint: str
    tars: dict[str, list[ShardEntry]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def shards(self) -> list[ShardEntry]:
        """All files of shards, of all splits and both formats."""
        given = (*self.splits.values(), *self.tars.values())
        return [entry for entries in given for entry in entries]

    def without(self, paths: Collection[str]) -> Manifest:
        """The manifest with the shards at ``paths`` left out of ``splits``."""
        kept = {
            split: [entry for entry in entries if entry.path not in paths] for split, entries in self.splits.items()
        }
        return replace(self, splits=kept)

    def save(self, directory: Path) -> None:
        content = json.dumps(sealed(asdict(self)), indent=1, sort_keys=True)
        write_atomically(directory / MANIFEST_FILE, (content + "\n").encode())

    @classmethod
    def load(cls, directory: Path | Folder) -> Manifest:
        """The manifest of a data directory.

        Raises:
            UserError: there is none, it is damaged, it is not one of ours, or it is of another format version.
        """
        folder = folder_at(directory)
        path = f"{folder}/{MANIFEST_FILE}"
        try:
            text = folder.read(MANIFEST_FILE)
        except FileNotFoundError:
            raise UserError(f"{path}: no manifest here; {folder.begin}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as a manifest ({error}); run preprocess.py again") from None
        try:
            version = content["format_version"]
            if version == FORMAT_VERSION:
                content = unsealed(content, path, folder.mend)
                shards = {
                    name: {split: [ShardEntry(**entry) for entry in entries] for split, entries in given.items()}
                    for name, given in (("splits", content["splits"]), ("tars", content["tars"]))
                }
                manifest = cls(**(content | shards))
                for entry in manifest.shards():
                    if not _SHARD_PATH.fullmatch(entry.path):
                        raise UserError(f"{path}: names {entry.path!r}, which is no place of a shard; {folder.mend}")
                    in_order = 1 <= entry.num_patients <= entry.num_sets <= entry.num_events < MOST_OF_A_SHARD
                    if not in_order or entry.num_patients > PATIENTS_A_BYTE * entry.num_bytes:
                        raise UserError(f"{path}: {entry.path} cannot hold as much as it says; {folder.mend}")
                return manifest
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest of this project ({error}); run preprocess.py again") from None
        raise UserError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}; run preprocess.py again"
        )


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of what it says, however it will be laid out."""
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def unsealed(content: Any, path: Path | str, mend: str) -> dict[str, Any]:
    """What :func:`sealed` was given; UserError where ``path`` holds something else."""
    plain = {name: value for name, value in content.items() if name != "sha256"} if isinstance(content, dict) else {}
    if sealed(plain) != content:
        raise UserError(f"{path}: checksum of its content is wrong; {mend}")
    return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatPatients:
    """Patients as flat arrays and offsets; P patients, S sets, E events.

    Attributes:
        patient_offsets: [P+1] int64, into the sets.
        set_offsets: [S+1] int64, into the events.
        minute: [S] float32; of a static set the minute of the patient's next set, 0 where there is none.
        code: [E] int32.
        value: [E] float32, 0 where the event has no number.
        has_value: [E] bool.
        label: [P] int64, -1 where unlabelled.
        patient_id: [P] strings, as Arrow holds them.
    """

    patient_offsets: npt.NDArray[np.int64]
    set_offsets: npt.NDArray[np.int64]
    minute: npt.NDArray[np.float32]
    code: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]
    has_value: npt.NDArray[np.bool_]
    label: npt.NDArray[np.int64]
    patient_id: pa.StringArray


def write_shard(table: pa.Table, directory: Path, path: str) -> ShardEntry:
    """Write ``table`` (``SHARD_SCHEMA``, sorted) to ``directory/path``, ``.parquet`` or ``.tar``.

    Returns:
        Its entry for the manifest.
    """
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        if target.suffix == ".tar":
            write_tar(table, temporary, target.stem)
        else:
            _write_row_groups(table, temporary)
    return ShardEntry(
        path=path,
        num_patients=table.num_rows,
        num_sets=int(np.sum(table["num_sets"].to_numpy(), dtype=np.int64)),
        num_events=int(np.sum(table["num_events"].to_numpy(), dtype=np.int64)),
        num_bytes=target.stat().st_size,
        sha256=file_sha256(target),
    )


def _write_row_groups(table: pa.Table, path: Path) -> None:
    group = offsets_of(table["num_events"].to_numpy())[:-1] // ROW_GROUP_EVENTS
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [table.num_rows]])
    with pq.ParquetWriter(path, SHARD_SCHEMA, compression="zstd", version="2.6", write_statistics=True) as writer:
        for start, stop in itertools.pairwise(starts.tolist()):
            writer.write_table(table.slice(start, stop - start))


def check_shards(directory: Path | Folder, entries: Sequence[ShardEntry]) -> dict[str, str]:
    """Compare shards with their entries, sizes and checksums alone; those of a folder elsewhere are fetched.

    Returns:
        What is wrong with a shard, by its path; nothing for one that is whole.

    Raises:
        UserError: a shard cannot be read, which need not be its fault.
    """
    folder, bad = folder_at(directory), {}
    for entry in entries:
        try:
            with folder.file(entry.path, entry.sha256, num_bytes=entry.num_bytes):
                pass
        except BadFile as error:
            bad[entry.path] = error.reason
    return bad


def read_shard(directory: Path | Folder, entry: ShardEntry, *, verify: bool = True) -> FlatPatients:
    """The patients of one shard of either format, in its order.

    Args:
        directory: a data directory; only a Folder remembers what it has verified.
        entry: of the shard.
        verify: compare its size and checksum with the manifest's.

    Raises:
        UserError: the file is missing, its checksum is not the manifest's, or its content contradicts itself.
    """
    folder = folder_at(directory)
    path = f"{folder}/{entry.path}"
    hint = f"the data set is damaged: {folder.mend}"
    try:
        with folder.file(entry.path, entry.sha256, num_bytes=entry.num_bytes, verify=verify) as local:
            table = _read_rows(local, Path(entry.path).suffix)
    except BadFile as error:
        whom = f"its {entry.num_patients:,} patients"
        raise UserError(f"{error}, or leave out {whom} with --on_bad_shard quarantine") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); {hint}") from None
    if not table.num_rows:
        raise UserError(f"{path}: holds no patients; {hint}")
    columns = {name: table[name].chunk(0) for name in SHARD_SCHEMA.names}

    def flat(name: str) -> pa.Array:
        return columns[name].flatten()

    set_size = flat("set_size").to_numpy()
    value = flat("value")
    patient_offsets = offsets_of(columns["num_sets"].to_numpy())
    patients = FlatPatients(
        patient_offsets=patient_offsets,
        set_offsets=offsets_of(set_size),
        minute=_with_static(flat("minute").to_numpy(zero_copy_only=False), patient_offsets).astype(np.float32),
        code=flat("code").to_numpy(),
        value=pc.fill_null(value, 0.0).to_numpy(),
        has_value=pc.is_valid(value).to_numpy(zero_copy_only=False),
        label=pc.fill_null(columns["label"].cast(pa.int64()), UNLABELLED).to_numpy(),
        patient_id=columns["patient_id"],
    )
    sizes = (len(patients.label), len(patients.minute), len(patients.code), len(patients.value))
    expected = (entry.num_patients, entry.num_sets, entry.num_events, entry.num_events)
    ends = (patients.patient_offsets[-1], patients.set_offsets[-1])
    if sizes != expected or ends != (entry.num_sets, entry.num_events) or set_size.min() < 1:
        raise UserError(f"{path}: {sizes} patients, sets, events and values, the manifest says {expected}; {hint}")
    return patients


def read_set_sizes(directory: Path | Folder, entry: ShardEntry) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """[P] sets of each patient and [S] events of each set of one shard: two columns of a Parquet file, all of a tar.

    Raises:
        UserError: the file is missing or contradicts the manifest.  The checksum is not compared: that would read all.
    """
    folder = folder_at(directory)
    path = f"{folder}/{entry.path}"
    hint = f"the data set is damaged: {folder.mend}"
    try:
        with folder.file(entry.path, entry.sha256, num_bytes=entry.num_bytes, verify=False) as local:
            table = _read_rows(local, Path(entry.path).suffix, ["num_sets", "set_size"])
        num_sets, set_size = table["num_sets"].to_numpy(), pc.list_flatten(table["set_size"]).to_numpy()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); {hint}") from None
    sizes = (len(num_sets), len(set_size), int(num_sets.sum()), int(set_size.sum()))
    expected = (entry.num_patients, entry.num_sets, entry.num_sets, entry.num_events)
    if sizes != expected:
        raise UserError(f"{path}: {sizes} patients, sets, sets and events, the manifest says {expected}; {hint}")
    return num_sets, set_size


def _with_static(minute: npt.NDArray[np.float64], patient_offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[S] minutes, with one for each static set (NaN), which can only be a patient's first."""
    static = np.flatnonzero(np.isnan(minute))
    if not len(static):
        return minute
    filled, alone = minute.copy(), np.isin(static + 1, patient_offsets)
    filled[static] = np.where(alone, 0.0, minute[np.minimum(static + 1, len(minute) - 1)])
    return filled


def _read_rows(path: Path, suffix: str, columns: list[str] | None = None) -> pa.Table:
    if suffix == ".tar":
        return read_tar(path).cast(SHARD_SCHEMA)
    return _read_parquet(path, SHARD_SCHEMA, columns).combine_chunks()


def _read_parquet(path: str | Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    # In this thread: others win nothing here, and where memory is short Arrow waits for ever for one it cannot start.
    with pq.ParquetFile(path) as file:
        table = file.read(columns=columns, use_threads=False)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return table.select(wanted.names).cast(wanted)


def read_index(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """``index.parquet``, checked against the manifest; columns as in ``INDEX_SCHEMA``."""
    return _read_table(directory, manifest, INDEX_FILE, INDEX_SCHEMA)


def read_vocabulary(directory: Path | Folder, manifest: Manifest) -> pa.Table:
    """``vocabulary.parquet``, checked against the manifest; columns as in ``VOCABULARY_SCHEMA``, a row a code."""
    return _read_table(directory, manifest, VOCABULARY_FILE, VOCABULARY_SCHEMA)


def _read_table(directory: Path | Folder, manifest: Manifest, name: str, schema: pa.Schema) -> pa.Table:
    folder = folder_at(directory)
    with checked_file(folder, manifest, name) as path:
        try:
            return _read_parquet(path, schema)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{folder}/{name}: cannot be read ({error}); run preprocess.py again") from None


def load_embeddings(directory: Path | Folder, manifest: Manifest) -> npt.NDArray[np.float32]:
    """``embeddings.npy``, [num_codes, embedding_dim], checked against the manifest; a header claims no memory."""
    folder = folder_at(directory)
    with checked_file(folder, manifest, EMBEDDINGS_FILE) as path:
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder}/{EMBEDDINGS_FILE}: cannot be read ({error}); {folder.mend}") from None
        if vectors.dtype != np.float32 or vectors.shape != (manifest.num_codes, manifest.embedding_dim):
            found = f"{vectors.dtype} {vectors.shape}"
            raise UserError(f"{folder}/{EMBEDDINGS_FILE}: holds {found}, the manifest says otherwise; {folder.mend}")
        return np.array(vectors)


@contextmanager
def checked_file(directory: Path | Folder, manifest: Manifest, name: str) -> Iterator[Path]:
    """A path on this machine of one of ``manifest.files``, while the context lasts; it has the manifest's checksum."""
    folder = folder_at(directory)
    if name not in manifest.files:
        raise UserError(f"{folder}/{name}: not in the manifest; run preprocess.py again")
    with folder.file(name, manifest.files[name]) as path:
        yield path


def sync(path: Path) -> None:
    """Wait until the content of ``path`` (a file or a directory) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new path beside ``path`` to write to, which then takes its place.

    ``path`` is the old file or the new one, whole, at every moment, through power loss too, and whoever else writes it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove_leftovers(folder: Path, name: str = "*", *, below: bool = False) -> None:
    """Remove what a killed process left of :func:`replacing` files of that name in ``folder``, and ``below`` it where
    all is ours; nobody else may be writing them.
    """
    leftovers = f".{name}.*{TEMPORARY}"
    for path in folder.rglob(leftovers) if below else folder.glob(leftovers):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` by way of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
