from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import shards
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import check_shards, read_shard
from pipeline.dataset.tables import read_index, read_vocabulary
from pipeline.schema import INDEX_FILE, MANIFEST_FILE, VOCABULARY_FILE, UserError
from pipeline.storage import files
from pipeline.storage.files import write_atomically
from tests.data_dirs import NUM_CODES, expected_batch, in_stored_order, make_patients, write_data_dir


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_data_dir(tmp_path / "data", {"train": make_patients([[1, 2], [3], [2, 2, 2], [9]])}, shard_size=3)


def test_a_shard_gives_back_what_was_written(directory: Path) -> None:
    stored = in_stored_order(make_patients([[1, 2], [3], [2, 2, 2], [9]]))
    first, second = (read_shard(directory, entry) for entry in Manifest.load(directory).splits["train"])
    for shard, patients in ((first, stored[:3]), (second, stored[3:])):
        expected = expected_batch(patients)
        assert shard.patient_id.to_pylist() == expected.pop("patient_id")
        del expected["label"]
        for name, values in expected.items():
            assert getattr(shard, name).tolist() == values, name
    assert {name: getattr(first, name).dtype for name in ("code", "value", "has_value", "minute")} == {
        "code": np.int32, "value": np.float32, "has_value": np.bool_, "minute": np.float32,
    }  # fmt: skip


def test_row_groups_hold_a_range_of_patients_of_about_equal_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_EVENTS", 10)
    directory = write_data_dir(tmp_path, {"train": make_patients([[4]] * 10 + [[25]])}, shard_size=99)
    entry = Manifest.load(directory).splits["train"][0]
    metadata = pq.ParquetFile(directory / entry.path).metadata
    # A patient belongs to the group in which its first event falls: 4-event patients begin at 0, 4, 8 | 12, 16 | …
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [3, 2, 3, 2, 1]
    assert len(read_shard(directory, entry).patient_id) == entry.num_patients == 11


def test_the_same_patients_give_the_same_bytes(tmp_path: Path) -> None:
    written = [
        Manifest.load(write_data_dir(tmp_path / name, {"train": make_patients([[1], [2, 3]])})) for name in ("a", "b")
    ]
    assert written[0].splits == written[1].splits


def test_directories_named_like_partitions_add_no_columns(tmp_path: Path) -> None:
    directory = write_data_dir(tmp_path / "num_events=7" / "code=1", {"train": make_patients([[1]], seed=1)})
    manifest = Manifest.load(directory)
    (expected,) = (patient.sets[0][1][0][0] for patient in make_patients([[1]], seed=1))
    assert read_shard(directory, manifest.splits["train"][0]).code.tolist() == [expected]
    assert read_index(directory, manifest)["num_events"].to_pylist() == [1]


def test_index_and_vocabulary_have_a_row_a_patient_and_a_row_a_code(directory: Path) -> None:
    manifest = Manifest.load(directory)
    index = read_index(directory, manifest)
    assert index["num_events"].to_pylist() == [3, 3, 6, 9]
    assert index["num_sets"].to_pylist() == [2, 1, 3, 1]
    assert index["max_set_size"].to_pylist() == [2, 3, 2, 9]
    assert index["position"].to_pylist() == [0, 1, 2, 0]
    assert read_vocabulary(directory, manifest)["code"].to_pylist() == list(range(NUM_CODES))


def damage_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "verify", "message"),
    [
        (damage_bytes, True, "checksum differs"),
        (Path.unlink, True, "is missing"),
        (lambda path: os.truncate(path, 100), True, "has 100 bytes, the manifest says"),
        (Path.unlink, False, "cannot be read"),
        (lambda path: os.truncate(path, 100), False, "cannot be read"),
        (lambda path: path.write_bytes(b""), False, "cannot be read"),
    ],
)
def test_a_damaged_shard_is_named(directory: Path, harm: Callable[[Path], None], verify: bool, message: str) -> None:
    entry = Manifest.load(directory).splits["train"][1]
    harm(directory / entry.path)
    with pytest.raises(UserError, match=message) as caught:
        read_shard(directory, entry, verify=verify)
    assert str(directory / entry.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_shards_are_found_without_decoding_any(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Manifest.load(directory).splits["train"]
    monkeypatch.setattr(shards, "read_parquet", None)
    assert check_shards(directory, [first, second]) == {}
    damage_bytes(directory / second.path)
    assert check_shards(directory, [first, second]) == {second.path: "checksum differs from the manifest's"}
    (directory / first.path).unlink()
    assert check_shards(directory, [first]) == {first.path: "is missing"}


def test_what_is_not_the_files_fault_is_no_bad_shard(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Manifest.load(directory).splits["train"]

    def fail(number: int) -> None:
        def stat(path: Path) -> os.stat_result:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "stat", stat)

    fail(errno.EMFILE)
    with pytest.raises(UserError, match=f"{entries[0].path}: cannot be read .Too many open files"):
        check_shards(directory, entries)
    fail(errno.EIO)
    assert check_shards(directory, entries).keys() == {entry.path for entry in entries}


@pytest.mark.parametrize("field", ["num_patients", "num_sets", "num_events"])
def test_a_shard_unlike_the_manifest_is_refused(directory: Path, field: str) -> None:
    entry = Manifest.load(directory).splits["train"][0]
    wrong = dataclasses.replace(entry, **{field: getattr(entry, field) + 1})
    with pytest.raises(UserError, match="the manifest says"):
        read_shard(directory, wrong)


@pytest.mark.parametrize("name", [INDEX_FILE, VOCABULARY_FILE])
def test_a_changed_or_missing_table_is_named(directory: Path, name: str) -> None:
    manifest = Manifest.load(directory)
    read = {INDEX_FILE: read_index, VOCABULARY_FILE: read_vocabulary}[name]
    damage_bytes(directory / name)
    with pytest.raises(UserError, match=f"{name}: checksum differs"):
        read(directory, manifest)
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        read(directory, manifest)


def test_a_manifest_survives_a_round_trip(directory: Path) -> None:
    manifest = Manifest.load(directory)
    manifest.save(directory)
    assert Manifest.load(directory) == manifest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest here; name the folder that preprocess.py wrote"),
        ("{", "cannot be read as a manifest"),
        ("[]", "not a manifest of this project"),
        ('{"format_version": 2}', "checksum of its content is wrong"),
        ('{"format_version": 99, "splits": {}}', "format version 99, this program reads 2"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path / MANIFEST_FILE) in str(caught.value)


def test_a_newer_format_is_refused_by_its_version_whatever_it_holds(directory: Path) -> None:
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3, "splits": 7}))
    with pytest.raises(UserError, match="format version 3"):
        Manifest.load(directory)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_only_leftovers_of_ours_are_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    ours, named = f".last.pt.{'0a' * 16}.tmp", f".report.html.{'9f' * 16}.tmp"
    others = ["last.pt", f"last.pt.{'0a' * 16}.tmp"]
    for name in (ours, named, *others, f"sub/{ours}"):
        (tmp_path / name).touch()

    def left() -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}

    files.remove_leftovers(tmp_path, "report.html")
    assert left() == {ours, *others, f"sub/{ours}"}
    files.remove_leftovers(tmp_path)
    assert left() == {*others, f"sub/{ours}"}
    files.remove_leftovers(tmp_path, below=True)
    assert left() == set(others)
