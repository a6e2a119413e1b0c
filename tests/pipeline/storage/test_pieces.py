from __future__ import annotations

import hashlib
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import preprocess
from pipeline import make_loader
from pipeline.arrays import Ints
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import JoinedRows, RowsByShard
from pipeline.dataset.tasks import Task
from pipeline.schema import INDEX_FILE, UserError
from pipeline.storage import pieces as module
from pipeline.storage.folder import BadFile, Folder
from pipeline.storage.pieces import PieceReader, Pieces, checksum_file
from pipeline.storage.remote import open_folder
from tests.data_dirs import add_task, make_patients, pieces_of, rewrite_task, write_data_dir
from tests.object_store import Fault, ObjectStore
from tests.pipeline.loading.test_batch import assert_equal

TABLE = "tasks/default.parquet"
PIECE_BYTES = 700


@given(
    content=st.binary(min_size=1, max_size=60),
    piece_bytes=st.integers(1, 70),
    reads=st.lists(st.tuples(st.integers(-70, 70), st.sampled_from([0, 1, 2]), st.integers(0, 70)), max_size=6),
)
def test_bytes_are_those_of_the_file_and_other_pieces_are_left_alone(
    content: bytes, piece_bytes: int, reads: list[tuple[int, int, int]]
) -> None:
    pieces, plain, taken, needed = pieces_of(content, piece_bytes), io.BytesIO(content), [], set[int]()

    def read_piece(number: int) -> bytes:
        taken.append(number)
        return content[slice(*pieces.bounds(number))]

    reader = PieceReader(pieces, read_piece)
    for offset, whence, size in reads:
        origin = [0, plain.tell(), len(content)][whence]
        plain.seek(max(origin + offset, 0))
        assert reader.seek(offset, whence) == plain.tell() == reader.tell()
        needed |= {at // piece_bytes for at in range(plain.tell(), min(plain.tell() + size, len(content)))}
        assert reader.read(size) == plain.read(size)
    assert sorted(taken) == sorted(needed), "each once"


@pytest.mark.parametrize("size", [0, 4, 5, 8, 9])
def test_a_large_file_has_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 4)
    (path := tmp_path / "file").write_bytes(content := bytes(range(size)))
    expected = pieces_of(content, 4) if size > 4 else None
    assert checksum_file(path) == (hashlib.sha256(content).hexdigest(), expected)


@pytest.mark.parametrize("change", [{"num_bytes": 9}, {"num_bytes": 0}, {"piece_bytes": 0}, {"sha256": ()}])
def test_pieces_that_contradict_themselves_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="checksums of pieces"):
        replace(Pieces(num_bytes=8, piece_bytes=4, sha256=("a", "b")), **change)


def test_what_is_prepared_has_pieces_of_its_index_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 500)
    rows = ["patient_id,minute,variable,value", *(f"p{i % 9},{i},{'abc'[i % 3]},{i * i % 17}" for i in range(60))]
    (tmp_path / "events.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "labels.csv").write_text("patient_id,label\n" + "".join(f"p{i},{i % 2}\n" for i in range(9)))
    data = tmp_path / "data"
    command = [str(tmp_path / "events.csv"), "--format", "table", "--output", str(data)]
    assert preprocess.main([*command, "--labels", str(tmp_path / "labels.csv")]) == 0
    manifest = Manifest.load(data)
    assert manifest.pieces == {INDEX_FILE: pieces_of((data / INDEX_FILE).read_bytes(), 500)}
    assert Task.load(data, manifest, "default").table_pieces == pieces_of((data / TABLE).read_bytes(), 500)
    (data / INDEX_FILE).write_bytes(b"")
    with pytest.raises(BadFile, match=rf"{INDEX_FILE}: has fewer bytes"):
        make_loader(data, task=None)


# ------------------------------------------------------------------------------------------------ a task's table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 patients in 15 shards with ten samples each, some without events, in row groups of 7 rows."""
    patients = make_patients([[1 + i % 3, 2, 1 + i % 2, 2] for i in range(30)], seed=3)
    directory = write_data_dir(tmp_path_factory.mktemp("data"), {"train": patients}, shard_size=2)
    for path in (directory / "tasks").iterdir():
        path.unlink()
    minutes = {patient.patient_id: [minute for minute, _ in patient.sets] for patient in patients}
    add_task(
        directory,
        [
            (patient, float(np.interp(share, [0, 10], [min(own) - 1, max(own)])), share % 2)
            for patient in patients
            for own in [minutes[patient.patient_id]]
            for share in range(10)
        ],
    )
    rewrite_task(directory, row_group_size=7, piece_bytes=PIECE_BYTES)
    return directory


def read_whole(rows: RowsByShard, paths: list[str]) -> tuple[Any, Ints]:
    """What :meth:`RowsByShard.read` returns, from the whole table and without checksums."""
    table = pq.read_table(Path(str(rows._folder)) / rows._file.name).select(rows._schema.names).cast(rows._schema)
    of_shard = [[row for row, path in enumerate(table["shard"].to_pylist()) if path == wanted] for wanted in paths]
    number = np.repeat(np.arange(len(paths)), [len(found) for found in of_shard])
    return table.take(np.concatenate([*of_shard, []]).astype(np.int64)), number


def collect(directory: Any, **flags: Any) -> list[Any]:
    """Two epochs of batches, small groups, of which the second resumes in the middle of one."""
    loader = make_loader(directory, batch_size=4, group_events=40, prefetch=0, **flags)
    batches = list(loader)
    for batch in loader:
        batches.append(batch)
        if loader.cursor == len(loader) // 2:
            break
    resumed = make_loader(directory, batch_size=4, group_events=40, prefetch=0, **flags)
    resumed.load_state_dict(loader.state_dict())
    return batches + list(resumed)


@settings(max_examples=6)
@given(
    row_group_size=st.integers(1, 60),
    piece_bytes=st.none() | st.integers(50, 9000),
    flags=st.sampled_from([{}, {"verify": False}, {"share_windows": True}, {"max_sequence_length": 3}]),
)
def test_batches_by_groups_are_those_of_the_whole_table(
    data: Path, row_group_size: int, piece_bytes: int | None, flags: dict[str, Any]
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        directory = Path(shutil.copytree(data, folder, dirs_exist_ok=True))
        rewrite_task(directory, row_group_size=row_group_size, piece_bytes=piece_bytes)
        found = collect(directory, **flags)
        monkeypatch.setattr(RowsByShard, "read", read_whole)
        expected = collect(directory, **flags)
    assert len(found) == len(expected) > 20
    for batch, other in zip(found, expected, strict=True):
        assert_equal(batch, other)


def test_a_group_reads_its_row_groups_and_their_pieces_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(data)
    task, whole = Task.load(data, manifest, "default"), pq.read_table(data / TABLE)["shard"].to_pylist()
    assert task.table_pieces is not None
    groups, pieces = list[int](), set[int]()
    read_groups, read_piece = pq.ParquetFile.read_row_groups, Folder._read_piece
    metadata = pq.read_metadata(data / TABLE)

    def note_groups(file: pq.ParquetFile, wanted: list[int], *rest: Any, **options: Any) -> Any:
        groups.extend(wanted)
        return read_groups(file, wanted, *rest, **options)

    def note_piece(folder: Folder, file: Any, of: Pieces, number: int) -> bytes:
        pieces.add(number)
        return read_piece(folder, file, of, number)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", note_groups)
    monkeypatch.setattr(Folder, "_read_piece", note_piece)
    rows = JoinedRows(Folder(data), task.table(), pq.read_schema(data / TABLE))
    rows.read([])
    for paths in (["train/00003.parquet"], ["train/00009.parquet", "train/00002.parquet"]):
        groups.clear()
        pieces.clear()
        rows.read(paths)
        needed = {row // 7 for row, path in enumerate(whole) if path in paths}
        assert groups == sorted(needed)
        assert 0 < len(needed) <= metadata.num_row_groups // 3
        columns = [metadata.row_group(group).column(number) for group in needed for number in range(10)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        bounds = [(start, start + each.total_compressed_size) for start, each in zip(starts, columns, strict=True)]
        assert pieces == {at // PIECE_BYTES for start, stop in bounds for at in range(start, stop)}
        assert len(pieces) < len(task.table_pieces.sha256) / 2


def test_what_is_damaged_is_found_when_it_is_read(data: Path, tmp_path: Path) -> None:
    directory, task = tmp_path / "data", Task.load(data, Manifest.load(data), "default")
    directory.mkdir()
    (directory / "tasks").mkdir()
    content = bytearray((data / TABLE).read_bytes())
    content[task.table_pieces.bounds(2)[0] + 5] ^= 1  # type: ignore[union-attr]
    (directory / TABLE).write_bytes(content)
    rows = JoinedRows(Folder(directory), task.table(), pq.read_schema(data / TABLE))
    rows.read(["train/00014.parquet"])
    with pytest.raises(BadFile, match=rf"{directory}/{TABLE}: checksum differs from the manifest's; copy"):
        rows.read([f"train/{shard:05d}.parquet" for shard in range(15)])
    os.truncate(directory / TABLE, 900)
    with pytest.raises(BadFile, match=rf"{directory}/{TABLE}: has fewer bytes"):
        rows.read(["train/00014.parquet"])
    (directory / TABLE).unlink()
    with pytest.raises(BadFile, match=rf"{directory}/{TABLE}: is missing; copy"):
        rows.read(["train/00014.parquet"])


# ------------------------------------------------------------------------------------------------ object storage


@pytest.fixture
def remote(store: ObjectStore, data: Path, tmp_path: Path) -> str:
    return store.upload(data, tmp_path.name)


def count_table(store: ObjectStore) -> int:
    """How often the store was asked for the table since the last time."""
    asked = [key for _, key in store.requests if key.endswith(TABLE)]
    store.requests.clear()
    return len(asked)


def test_a_table_of_a_store_comes_in_pieces_that_are_kept(
    store: ObjectStore, remote: str, data: Path, tmp_path: Path
) -> None:
    task = Task.load(data, Manifest.load(data), "default")
    assert task.table_pieces is not None
    schema, every = pq.read_schema(data / TABLE), task.table_pieces.sha256
    rows = JoinedRows(open_folder(remote, cache_dir=tmp_path / "cache"), task.table(), schema)
    table, _ = rows.read(["train/00003.parquet"])
    assert table.equals(pq.read_table(data / TABLE, filters=[("shard", "=", "train/00003.parquet")]).cast(schema))
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert count_table(store) == len(kept & {*every}) < len(every)
    again = JoinedRows(open_folder(remote, cache_dir=tmp_path / "cache"), task.table(), schema)
    assert again.read(["train/00003.parquet"])[0].equals(table)
    assert count_table(store) == 0
    damaged = tmp_path / "cache" / max(kept & {*every})
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert again.read([f"train/{shard:05d}.parquet" for shard in range(15)])[0].num_rows == 300


def test_batches_from_a_store_are_those_of_the_folder(remote: str, data: Path, tmp_path: Path) -> None:
    found, expected = collect(open_folder(remote, cache_dir=tmp_path / "cache")), collect(data)
    for batch, other in zip(found, expected, strict=True):
        assert_equal(batch, other)


@pytest.mark.parametrize(("fault", "says"), [("wrong", "checksum differs"), ("denied", "access denied")])
def test_what_a_store_gives_wrongly_is_not_kept(
    store: ObjectStore, remote: str, data: Path, tmp_path: Path, fault: Fault, says: str
) -> None:
    task = Task.load(data, Manifest.load(data), "default")
    folder = open_folder(remote, cache_dir=tmp_path / "cache")
    store.choose = lambda method, key: fault
    rows = JoinedRows(folder, task.table(verify=False), pq.read_schema(data / TABLE))
    with pytest.raises(UserError, match=f"{remote}/{TABLE}: .*{says}"):
        rows.read(["train/00003.parquet"])
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"CACHEDIR.TAG"}
    store.reset()
    assert rows.read(["train/00003.parquet"])[0].num_rows == 20
