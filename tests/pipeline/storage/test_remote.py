from __future__ import annotations

import dataclasses
import fcntl
import io
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import preprocess
from pipeline import make_loader
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import check_shards, read_shard
from pipeline.dataset.tables import read_index
from pipeline.reports import plan_table as plan_report
from pipeline.schema import EMBEDDINGS_FILE, INDEX_FILE, MANIFEST_FILE, UserError
from pipeline.storage import ahead
from pipeline.storage.cache import PART_SUFFIX, TAG, TAG_FILE, parse_bytes
from pipeline.storage.folder import BadFile, File, Folder
from pipeline.storage.remote import RemoteFolder, open_folder
from tests.conftest import ragged_sizes
from tests.data_dirs import Patient, make_patients, write_data_dir
from tests.object_store import BUCKET, Fault, ObjectStore
from tests.pipeline.loading.test_batch import assert_equal
from tests.processes import CONTEXT

ROOT = Path(__file__).parents[3]


def cached(cache: Path) -> dict[str, int]:
    """Bytes of each file of a cache, but for the tag."""
    return {path.name: path.stat().st_size for path in cache.iterdir() if path.name != TAG_FILE}


def index_of(directory: Path) -> dict[str, int]:
    """What :func:`cached` says of the index alone."""
    return {Manifest.load(directory).files[INDEX_FILE]: (directory / INDEX_FILE).stat().st_size}


def entries_of(directory: Path | Folder, split: str = "train") -> list[ShardEntry]:
    return Manifest.load(directory).splits[split]


TASK_FILES = ("tasks/default.json", "tasks/default.parquet")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def remote(store: ObjectStore, data_dir: Path, tmp_path: Path) -> str:
    """The URL of ``data_dir`` in the store; its own for each test."""
    return store.upload(data_dir, tmp_path.name)


# ------------------------------------------------------------------------------------------------ the same data


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_batches_are_those_of_a_parquet_folder_bit_for_bit(
    store: ObjectStore, data_dir: Path, patients: list[Patient], tmp_path: Path, scheme: str, suffix: str
) -> None:
    import fsspec

    directory = (
        data_dir if suffix == ".parquet" else write_data_dir(tmp_path / "tars", {"train": patients}, suffix=suffix)
    )
    url = f"{scheme}://{directory}"
    if scheme == "s3":
        url = store.upload(directory, tmp_path.name)
    if scheme == "memory":
        fsspec.filesystem("memory").put(f"{directory}/", f"/{tmp_path.name}/", recursive=True)
        url = f"memory://{tmp_path.name}"
    flags = {"batch_size": 7, "max_sequence_length": 20}
    local, remote, tars = (make_loader(where, **flags) for where in (data_dir, url, directory))
    for batches in zip(local, remote, tars, strict=True):
        for batch in batches[1:]:
            assert_equal(batch, batches[0])


def test_what_is_cached_is_not_fetched_again_but_for_the_manifest(store: ObjectStore, remote: str, cache: Path) -> None:
    first = list(make_loader(open_folder(remote, cache_dir=cache)))
    names = {key.split("/", 1)[1] for method, key in store.requests if method == "GET"}
    shards = [entry.path for entry in entries_of(open_folder(remote, cache_dir=cache))]
    assert names == {MANIFEST_FILE, *TASK_FILES, *shards}
    store.requests.clear()
    again = list(make_loader(open_folder(f"{remote}/", cache_dir=cache)))
    assert {key.split("/", 1)[1] for _, key in store.requests} == {MANIFEST_FILE, "tasks/default.json"}
    for batch, other in zip(first, again, strict=True):
        assert_equal(batch, other)


def test_the_default_cache_is_the_users(remote: str, data_dir: Path, tmp_path: Path) -> None:
    list(make_loader(remote, task=None, split="valid"))
    (entry,) = entries_of(open_folder(remote), "valid")
    assert cached(tmp_path / "user_cache" / "seqsetvae") == index_of(data_dir) | {entry.sha256: entry.num_bytes}


@pytest.mark.parametrize("task", [None, "default"])
@pytest.mark.parametrize("group_events", [440, 10**6])
def test_a_plan_its_length_and_a_restored_place_fetch_no_shard(
    store: ObjectStore, remote: str, data_dir: Path, cache: Path, group_events: int, task: str | None
) -> None:
    flags: dict[str, Any] = {"task": task, "max_events": 150, "max_sequence_length": 30, "group_events": group_events}
    near = make_loader(data_dir, **flags)
    steps = len(list(near))
    far = make_loader(open_folder(remote, cache_dir=cache), **flags)
    assert (len(far), far.longest_patient) == (steps, 30)
    far.load_state_dict(near.state_dict())
    assert (far.epoch, far.step) == (1, steps)
    far.set_epoch(7)
    assert len(far) > 0
    table = INDEX_FILE if task is None else "tasks/default.parquet"
    others = [] if task is None else ["tasks/default.json"]
    assert {key.split("/", 1)[1] for _, key in store.requests} == {MANIFEST_FILE, table, *others}
    assert [method for method, key in store.requests if key.endswith(table)].count("GET") == 1
    assert len(cached(cache)) == 1


def test_a_data_set_that_changed_is_another(store: ObjectStore, remote: str, tmp_path: Path, cache: Path) -> None:
    list(make_loader(open_folder(remote, cache_dir=cache)))
    old = Manifest.load(open_folder(remote, cache_dir=cache))
    others = make_patients(ragged_sizes(20, seed=9), seed=9)
    changed = write_data_dir(tmp_path / "changed", {"train": others, "valid": [], "test": []})
    assert store.upload(changed, tmp_path.name) == remote
    for batch, expected in zip(make_loader(open_folder(remote, cache_dir=cache)), make_loader(changed), strict=True):
        assert_equal(batch, expected)
    with pytest.raises(UserError, match=r"train/00000\.parquet: (has|checksum)"):
        # Begun with the manifest of before: what is not cached is not taken from the new data set.
        read_shard(open_folder(remote, cache_dir=tmp_path / "empty"), old.splits["train"][0])


def test_the_plan_of_a_url_is_that_of_the_folder(
    remote: str, data_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for arguments in ([str(data_dir)], [remote, "--cache_dir", str(cache)]):
        assert plan_report.main([*arguments, "--batch_size", "4"]) == 0
        tables.append(capsys.readouterr().out.splitlines()[1:])
    assert tables[0] == tables[1]
    assert len(cached(cache)) == 1, "the index and no shard"


def test_like_a_url_gives_the_bytes_of_like_a_folder(store: ObjectStore, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    rows = ["patient_id,minute,variable,value", *(f"p{i % 9},{i},{'abc'[i % 3]},{i * i % 17}" for i in range(60))]
    (source / "events.csv").write_text("\n".join(rows) + "\n")
    cached_csv = tmp_path / "vectors.csv"
    cached_csv.write_text("Key,0,1\n" + "".join(f"{name},0.5,{place}\n" for place, name in enumerate("abc")))
    table = [str(source), "--format", "table"]
    assert preprocess.main([*table, "--output", str(tmp_path / "data"), "--embeddings", str(cached_csv)]) == 0
    url = store.upload(tmp_path / "data", tmp_path.name)
    for name, like in (("near", str(tmp_path / "data")), ("far", url)):
        assert preprocess.main([*table, "--output", str(tmp_path / name), "--like", like]) == 0
    near, far = (Manifest.load(tmp_path / name) for name in ("near", "far"))
    assert near == far
    assert EMBEDDINGS_FILE in far.files


def test_a_plain_folder_needs_neither_fsspec_nor_polars(data_dir: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.modules |= dict.fromkeys(("fsspec", "s3fs", "botocore", "polars"))  # None: importing them fails
import train
assert train.main(["--data_dir", sys.argv[1], "--output_dir", sys.argv[2], "--max_epochs", "1"]) == 0
"""
    command = [sys.executable, "-c", program, str(data_dir), str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)


# ------------------------------------------------------------------------------------------------ the cache


def fetch(folder: Folder, entry: ShardEntry) -> None:
    with folder.local_file(File(entry.path, entry.sha256, entry.num_bytes)):
        pass


def test_the_longest_unused_files_make_room(remote: str, cache: Path) -> None:
    entries = entries_of(open_folder(remote, cache_dir=cache))[:4]
    limit = sum(entry.num_bytes for entry in entries[:3])
    folder = open_folder(remote, cache_dir=cache, cache_bytes=str(limit))
    for number in (0, 1, 2):
        fetch(folder, entries[number])
        os.utime(cache / entries[number].sha256, (number, number))
    fetch(folder, entries[0])  # used: now the oldest is 1
    fetch(folder, entries[3])
    kept = cached(cache)
    assert entries[1].sha256 not in kept
    assert {entries[0].sha256, entries[3].sha256} <= kept.keys()
    assert sum(kept.values()) <= limit


@pytest.mark.parametrize("limit", [0, 12_000])
def test_a_data_set_larger_than_the_cache_is_read(remote: str, data_dir: Path, cache: Path, limit: int) -> None:
    entries = entries_of(data_dir)
    assert sum(entry.num_bytes for entry in entries) > 2 * 12_000
    folder = open_folder(remote, cache_dir=cache, cache_bytes=str(limit))
    for batch, expected in zip(make_loader(folder), make_loader(data_dir), strict=True):
        assert_equal(batch, expected)
    assert sum(cached(cache).values()) <= max(limit, *(entry.num_bytes for entry in entries)), "or the last one alone"


def test_groups_come_through_a_cache_that_holds_none_of_them(remote: str, data_dir: Path, cache: Path) -> None:
    flags = {"group_events": 440, "max_events": 150}
    there = make_loader(open_folder(remote, cache_dir=cache, cache_bytes="0"), **flags)
    here = make_loader(data_dir, **flags)
    for _ in range(2):
        assert len(there) == len(here)
        for batch, expected in zip(there, here, strict=True):
            assert_equal(batch, expected)


def test_a_file_in_use_stays(remote: str, cache: Path) -> None:
    first, second, third = entries_of(open_folder(remote, cache_dir=cache))[:3]
    user, other = (open_folder(remote, cache_dir=cache, cache_bytes="0") for _ in range(2))
    with user.local_file(File(first.path, first.sha256)) as path:
        fetch(other, second)
        fetch(other, third)
        assert path.read_bytes()
        assert cached(cache).keys() == {first.sha256, third.sha256}
    fetch(other, second)
    assert cached(cache).keys() == {second.sha256}


def test_only_files_of_the_cache_are_ever_removed(remote: str, cache: Path, tmp_path: Path) -> None:
    folder = open_folder(remote, cache_dir=cache, cache_bytes="0")
    mine = ["notes.txt", "A" * 64, "a" * 63, "a" * 65, f"{'a' * 64}.partial", ".hidden"]
    for name in mine:
        (cache / name).write_bytes(b"mine")
    (cache / ("d" * 64)).mkdir()
    (tmp_path / "target").write_bytes(b"mine")
    (cache / ("e" * 64)).symlink_to(tmp_path / "target")
    (cache / ("f" * 64)).write_bytes(b"a file of an older run")
    list(make_loader(folder))
    left = {path.name for path in cache.iterdir()}
    assert {*mine, "d" * 64, "e" * 64} <= left
    assert "f" * 64 not in left
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_a_folder_of_others_is_no_cache(remote: str, tmp_path: Path) -> None:
    for name in ("documents", "cache_of_another", "file"):
        place = tmp_path / name
        if name == "file":
            place.write_bytes(b"")
        else:
            place.mkdir()
            (place / ("thesis.tex" if name == "documents" else TAG_FILE)).write_bytes(TAG[:43] + b"\n# of another\n")
        with pytest.raises(UserError, match=f"--cache_dir {place}: (holds|cannot be used)"):
            open_folder(remote, cache_dir=place)
        assert place.is_file() or len(list(place.iterdir())) == 1
    (half := tmp_path / "half").mkdir()
    (half / TAG_FILE).write_bytes(TAG[:20])  # a crash while the cache was made
    open_folder(remote, cache_dir=half)
    assert (half / TAG_FILE).read_bytes() == TAG


def test_a_cached_file_that_was_damaged_is_fetched_again(
    remote: str, data_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(make_loader(open_folder(remote, cache_dir=cache)))
    entry = entries_of(data_dir)[2]
    content = bytearray((cache / entry.sha256).read_bytes())
    content[30] ^= 1
    (cache / entry.sha256).write_bytes(content)
    folder = open_folder(remote, cache_dir=cache)
    read_shard(folder, entries_of(data_dir)[3])  # another one, which must not pass for having verified this one
    for batch, expected in zip(make_loader(folder), make_loader(data_dir), strict=True):
        assert_equal(batch, expected)
    assert capsys.readouterr().err == f"warning: {cache / entry.sha256}: damaged; it is fetched again\n"


def test_a_file_is_verified_once_by_each_folder(remote: str, data_dir: Path, cache: Path, tmp_path: Path) -> None:
    entry = entries_of(data_dir)[0]
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    far, near = open_folder(remote, cache_dir=cache), Folder(copy)
    for folder in (far, near):
        with folder.local_file(File(entry.path, entry.sha256, entry.num_bytes)) as path:
            path.write_bytes(flip(path.read_bytes()))
        fetch(folder, entry)
    with pytest.raises(BadFile, match="checksum differs"):
        fetch(Folder(copy), entry)
    fetch(open_folder(remote, cache_dir=cache), entry)
    assert (cache / entry.sha256).read_bytes() == (data_dir / entry.path).read_bytes()


@pytest.mark.parametrize("leftover", [b"", b"half of it", bytes(1 << 20)])
def test_what_a_crash_left_is_written_anew(remote: str, data_dir: Path, cache: Path, leftover: bytes) -> None:
    folder = open_folder(remote, cache_dir=cache)
    entry = entries_of(data_dir)[0]
    (cache / (entry.sha256 + PART_SUFFIX)).write_bytes(leftover)
    fetch(folder, entry)
    assert (cache / entry.sha256).read_bytes() == (data_dir / entry.path).read_bytes()
    assert cached(cache).keys() == {entry.sha256}


def read_all(url: str, cache: Path) -> None:
    list(make_loader(open_folder(url, cache_dir=cache), task=None, fetch_ahead=0))


def test_killed_while_it_fetches_and_started_again(
    store: ObjectStore, remote: str, data_dir: Path, cache: Path
) -> None:
    # Manifest and index: size and content of each; shard: size, and nothing.
    store.faults.extend(["ok", "ok", "ok", "ok", "ok", "silent"])
    process = multiprocessing.get_context("spawn").Process(target=read_all, args=(remote, cache))
    process.start()
    store.wait_for(6)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    store.release.set()
    (entry,) = (entry for entry in entries_of(data_dir) if store.requests[-1][1].endswith(entry.path))
    part = {entry.sha256 + PART_SUFFIX: entry.num_bytes}
    assert cached(cache) == index_of(data_dir) | part, "its room is taken before it comes"
    read_all(remote, cache)
    shards = {entry.sha256: entry.num_bytes for entry in entries_of(data_dir)}
    assert cached(cache) == index_of(data_dir) | shards


def leave_while_it_fetches(url: str, cache: Path) -> None:
    ahead.GRACE_SECONDS = 0.01
    loader = make_loader(open_folder(url, cache_dir=cache), task=None, prefetch=2)
    reader = threading.Thread(target=loader.__iter__().__next__, daemon=True)
    reader.start()
    while not any(path.stat().st_size for path in cache.glob(f"*{PART_SUFFIX}")):  # its room is taken: it is asked for
        time.sleep(0.01)


def test_a_process_that_ends_while_a_store_is_silent_leaves_no_part(
    store: ObjectStore, remote: str, data_dir: Path, cache: Path
) -> None:
    store.choose = lambda method, key: "silent" if method == "GET" and "/train/" in key else "ok"
    process = multiprocessing.get_context("spawn").Process(target=leave_while_it_fetches, args=(remote, cache))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert cached(cache) == index_of(data_dir)


def read_at_random(url: str, cache: Path, limit: int, seed: int, expected: dict[str, bytes]) -> None:
    rng = random.Random(seed)
    entries = entries_of(open_folder(url, cache_dir=cache))
    for _ in range(25):
        folder = open_folder(url, cache_dir=cache, cache_bytes=str(limit))
        for entry in rng.sample(entries, 3):
            with folder.local_file(File(entry.path, entry.sha256, entry.num_bytes)) as path:
                assert path.read_bytes() == expected[entry.path]


def test_processes_share_a_small_cache(data_dir: Path, cache: Path) -> None:
    """Each file is evicted, fetched and read many times; whatever is read is whole."""
    entries = entries_of(data_dir)
    expected = {entry.path: (data_dir / entry.path).read_bytes() for entry in entries}
    limit = 2 * entries[0].num_bytes
    arguments = [(f"file://{data_dir}", cache, limit, seed, expected) for seed in range(4)]
    processes = [CONTEXT.Process(target=read_at_random, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    whole = {entry.sha256: entry.num_bytes for entry in entries}
    left = cached(cache)
    assert left.items() <= whole.items(), "no part is left"


def test_a_part_that_another_writes_is_waited_for(remote: str, data_dir: Path, cache: Path, store: ObjectStore) -> None:
    folder = open_folder(remote, cache_dir=cache)
    entry = entries_of(data_dir)[0]
    part = cache / (entry.sha256 + PART_SUFFIX)
    context = multiprocessing.get_context("spawn")
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = context.Process(target=read_one, args=(remote, cache, entry))
        process.start()
        store.wait_for(1)  # it has the manifest
        file.write((data_dir / entry.path).read_bytes())
        file.flush()
        os.replace(part, cache / entry.sha256)
    process.join()
    assert process.exitcode == 0
    assert not [key for _, key in store.requests if key.endswith(entry.path)], "the other's file was good enough"
    fetch(folder, entry)


def read_one(url: str, cache: Path, entry: ShardEntry) -> None:
    folder = open_folder(url, cache_dir=cache)
    Manifest.load(folder)
    fetch(folder, entry)


def test_a_full_disk_is_named(remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(remote, cache_dir=cache)
    entry = entries_of(folder)[0]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"--cache_dir {cache}: cannot be used .No space left"):
        fetch(folder, entry)
    assert not cached(cache)


# ------------------------------------------------------------------------------------------------ a store that fails


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts of a fifth of a second; s3fs tries five times."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.2)
    monkeypatch.setattr(s3fs.S3FileSystem, "connect_timeout", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.parametrize(
    "faults", [["busy"], ["busy", "busy"], ["ok", "busy", "ok", "busy"], ["ok", "ok", "ok", "cut"]]
)
def test_what_passes_is_tried_again(
    store: ObjectStore, remote: str, data_dir: Path, cache: Path, faults: list[Fault]
) -> None:
    store.faults.extend(faults)
    for batch, expected in zip(make_loader(open_folder(remote, cache_dir=cache)), make_loader(data_dir), strict=True):
        assert_equal(batch, expected)
    assert not store.faults


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["silent"], r"manifest\.json: the store does not give it \(Read timeout"),
        (["ok", "ok", "ok", "silent"], r"index\.parquet: the store does not give it \(Read timeout"),
        (["ok"] * 5 + ["silent"], r"train/\d+\.parquet: the store does not give it \(Read timeout"),
        (["denied"], r"manifest\.json: access denied \(Forbidden\); check the credentials"),
        (["ok", "ok", "denied"], r"index\.parquet: access denied"),
        (["ok"] * 4 + ["denied"], r"train/\d+\.parquet: access denied"),
        (["ok"] * 5 + ["cut"], r"train/\d+\.parquet: the store does not give it"),
    ],
)
def test_what_lasts_is_one_clear_line(
    store: ObjectStore, remote: str, data_dir: Path, cache: Path, faults: list[Fault], message: str
) -> None:
    store.faults.extend([*faults[:-1], *faults[-1:] * 50])
    with pytest.raises(UserError, match=message) as caught:
        list(make_loader(open_folder(remote, cache_dir=cache), task=None, fetch_ahead=0))
    assert "\n" not in str(caught.value)
    whole = index_of(data_dir) if len(faults) > 4 else {}
    assert cached(cache) == whole, "nothing is kept of what did not come"


@pytest.mark.usefixtures("quick", "store")
def test_no_server_and_no_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(UserError, match="Could not connect to the endpoint"):
            make_loader(f"s3://{BUCKET}/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="Unable to locate credentials"):
        make_loader(f"s3://{BUCKET}/x")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("url", ["s3://no-such-bucket/x", f"s3://{BUCKET}/no/such/prefix", "memory://nothing"])
def test_a_missing_bucket_or_manifest_is_named(url: str) -> None:
    with pytest.raises(UserError, match=f"{url}/{MANIFEST_FILE}: no manifest here; check the URL"):
        make_loader(url)


@pytest.mark.parametrize(
    ("missing", "url", "message"),
    [
        ("fsspec", "s3://bucket/x", r"needs fsspec, .* pip install 'seqsetvae\[remote\]'"),
        ("s3fs", "s3://bucket/x", r"Install s3fs .* pip install 'seqsetvae\[remote\]'"),
        ("nothing", "what://bucket/x", "Protocol not known"),
    ],
)
def test_a_missing_package_or_an_unknown_scheme_is_named(
    missing: str, url: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    if missing == "s3fs":
        monkeypatch.delitem(sys.modules[fsspec.register_implementation.__module__]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails
    with pytest.raises(UserError, match=f"{url}: .*{message}"):
        open_folder(url, cache_dir=cache)


def shorten(content: bytes) -> bytes:
    return content[:-1]


def flip(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(shorten, r"has \d+ bytes, the manifest says"), (flip, "checksum differs"), (None, "is missing")],
)
def test_a_bad_shard_is_named_and_can_be_left_out(
    store: ObjectStore,
    remote: str,
    data_dir: Path,
    cache: Path,
    harm: Callable[[bytes], bytes] | None,
    reason: str,
) -> None:
    entries = entries_of(data_dir)
    key = f"{remote.removeprefix(f's3://{BUCKET}/')}/{entries[3].path}"
    if harm is None:
        store.client.delete_object(Bucket=BUCKET, Key=key)
    else:
        store.client.put_object(Bucket=BUCKET, Key=key, Body=harm((data_dir / entries[3].path).read_bytes()))
    folder = open_folder(remote, cache_dir=cache)
    with pytest.raises(UserError, match=f"{remote}/{entries[3].path}: {reason}.*; upload .* --on_bad_shard quarantine"):
        list(make_loader(folder))
    bad = check_shards(folder, entries)
    assert bad.keys() == {entries[3].path}
    loader = make_loader(folder, quarantined=bad)
    assert loader.num_samples == 53 - 5
    assert entries[3].sha256 not in cached(cache)


def test_a_store_that_does_not_tell_sizes_will_do(
    remote: str, data_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(io.BytesIO):
        size = None

    folder = open_folder(remote, cache_dir=cache)
    assert isinstance(folder, RemoteFolder)
    monkeypatch.setattr(folder._store, "open", lambda name: Stream((data_dir / name).read_bytes()))
    manifest = Manifest.load(folder)
    assert read_index(folder, manifest).equals(read_index(data_dir, manifest))
    for batch, expected in zip(make_loader(folder), make_loader(data_dir), strict=True):
        assert_equal(batch, expected)


def test_a_checksum_that_is_a_path_is_refused(data_dir: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    manifest = Manifest.load(copy)
    dataclasses.replace(manifest, files=manifest.files | {INDEX_FILE: "../stolen"}).save(copy)
    with pytest.raises(UserError, match=r"checksum '\.\./stolen' is none"):
        plan_report.SplitLengths.read(open_folder(f"file://{copy}", cache_dir=cache), "train")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("8GB", 8 * 10**9), ("8 gib", 8 * 2**30), ("1.5K", 1500), ("2TiB", 2**41), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "GB", "8 GB more", "8EB", "1e9", "8i"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--cache_bytes"):
        parse_bytes(text)


def test_a_folder_is_given_back_and_a_path_is_plain(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert open_folder(folder) is folder
    assert not isinstance(open_folder(str(tmp_path)), RemoteFolder)
    with pytest.raises(BadFile, match=f"{tmp_path}/x: is missing"), folder.local_file(File("x", "0" * 64)):
        pass
