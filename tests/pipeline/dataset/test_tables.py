from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.samples import SampleIndex
from pipeline.schema import INDEX_FILE, UserError
from pipeline.storage.files import file_sha256
from pipeline.storage.folder import Folder
from tests.data_dirs import Patient, in_stored_order, make_patients, write_data_dir


def rewrite_index(directory: Path, **options: Any) -> Manifest:
    """Write the index again, in row groups of another size, and its checksum into the manifest."""
    pq.write_table(pq.read_table(directory / INDEX_FILE), directory / INDEX_FILE, **options)
    manifest = Manifest.load(directory)
    changed = replace(manifest, files=manifest.files | {INDEX_FILE: file_sha256(directory / INDEX_FILE)})
    changed.save(directory)
    return changed


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, patients: list[Patient]) -> list[Path]:
    """The same data with an index of one row group, of one a shard, of several a shard, and without statistics."""
    options: list[dict[str, Any]] = [
        {}, {"row_group_size": 5}, {"row_group_size": 3}, {"row_group_size": 7, "write_statistics": False}
    ]  # fmt: skip
    found = []
    for option in options:
        splits = {"train": patients, "valid": make_patients([[2, 3], [1]], prefix="v")}
        found.append(write_data_dir(tmp_path_factory.mktemp("data"), splits))
        rewrite_index(found[-1], **option)
    return found


@given(picked=st.lists(st.integers(0, 10), unique=True), layout=st.integers(0, 3), again=st.booleans())
def test_lengths_are_those_of_the_shards_asked_for(
    directories: list[Path], patients: list[Patient], picked: list[int], layout: int, again: bool
) -> None:
    manifest = Manifest.load(directories[layout])
    index, stored = SampleIndex(Folder(directories[layout]), manifest), in_stored_order(patients)
    if again:
        index.read(manifest.splits["valid"])
    samples = index.read([manifest.splits["train"][shard] for shard in picked])
    expected = [patient for shard in picked for patient in stored[5 * shard : 5 * shard + 5]]
    assert samples.num_events.tolist() == [patient.num_events for patient in expected]
    assert samples.num_sets.tolist() == [patient.num_sets for patient in expected]


def test_row_groups_of_other_shards_are_not_read(directories: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(directories[1])
    read = []
    whole = pq.ParquetFile.read_row_groups

    def noted(file: pq.ParquetFile, groups: list[int], columns: list[str], **options: Any) -> Any:
        read.append((groups, columns))
        return whole(file, groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noted)
    SampleIndex(Folder(directories[1]), manifest).read(manifest.splits["train"][4:6])
    assert read == [([4, 5], ["shard", "num_events", "num_sets"])]


def test_the_checksum_is_compared_once_by_each_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data_dir(tmp_path, {"train": make_patients([[1, 2], [3]])})
    manifest, folder, summed = Manifest.load(data), Folder(data), []

    def noted(path: Path) -> str:
        summed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("pipeline.storage.folder.file_sha256", noted)
    for _ in range(2):
        index = SampleIndex(folder, manifest)
        index.read(manifest.splits["train"])
        index.read([])
    assert summed == [INDEX_FILE]
    SampleIndex(Folder(data), manifest, verify=False).read(manifest.splits["train"])
    assert summed == [INDEX_FILE]
    (data / INDEX_FILE).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"{INDEX_FILE}: checksum differs"):
        SampleIndex(Folder(data), manifest).read(manifest.splits["train"])
    with pytest.raises(UserError, match=f"{INDEX_FILE}: cannot be read"):
        SampleIndex(Folder(data), manifest, verify=False).read(manifest.splits["train"])


@pytest.mark.parametrize("field", ["num_patients", "num_sets", "num_events"])
def test_an_index_unlike_the_manifest_is_refused(tmp_path: Path, field: str) -> None:
    data = write_data_dir(tmp_path, {"train": make_patients([[1, 2], [3]])})
    manifest = Manifest.load(data)
    entry: ShardEntry = manifest.splits["train"][0]
    with pytest.raises(UserError, match=f"{data}/{INDEX_FILE}: contradicts the manifest"):
        SampleIndex(Folder(data), manifest).read([replace(entry, **{field: getattr(entry, field) + 1})])


def test_an_index_of_other_columns_is_named(tmp_path: Path) -> None:
    data = write_data_dir(tmp_path, {"train": make_patients([[1, 2], [3]])})
    pq.write_table(pq.read_table(data / INDEX_FILE).drop_columns(["shard"]), data / INDEX_FILE)
    manifest = Manifest.load(data)
    with pytest.raises(UserError, match=f"{data}/{INDEX_FILE}: cannot be read"):
        SampleIndex(Folder(data), manifest, verify=False).read(manifest.splits["train"])


@pytest.mark.parametrize("shard", [pa.array([7, 7]), pa.array([b"x", b"x"]), pa.nulls(2), pa.array([[1], [2]])])
def test_an_index_of_other_types_is_named(tmp_path: Path, shard: pa.Array) -> None:
    data = write_data_dir(tmp_path, {"train": make_patients([[1, 2], [3]])})
    index = pq.read_table(data / INDEX_FILE)
    pq.write_table(index.set_column(index.column_names.index("shard"), "shard", shard), data / INDEX_FILE)
    manifest = Manifest.load(data)
    with pytest.raises(UserError, match=f"{data}/{INDEX_FILE}: cannot be read"):
        SampleIndex(Folder(data), manifest, verify=False).read(manifest.splits["train"])
