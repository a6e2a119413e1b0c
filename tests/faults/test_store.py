"""A store that misbehaves at random while shards are fetched ahead: the same batches, or one line with the shard."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipeline import make_loader
from pipeline.dataset.manifest import Manifest
from pipeline.schema import UserError
from pipeline.storage.cache import PART_SUFFIX
from pipeline.storage.remote import open_folder
from tests.faults.conftest import cases
from tests.object_store import Fault, ObjectStore
from tests.pipeline.loading.test_batch import assert_equal

FAULTS: list[Fault] = ["busy", "broken", "cut", "wrong", "reset", "silent", "denied"]


def misbehave(seed: int, share: float) -> Callable[[str, str], Fault]:
    """Return what chooses faults of requests for shards: a few kinds, in a share of the requests."""
    rng = random.Random(seed)
    kinds, lock = rng.sample(FAULTS, rng.randint(1, 3)), threading.Lock()

    def choose(method: str, key: str) -> Fault:
        with lock:
            return rng.choice(kinds) if "/train/" in key and rng.random() < share else "ok"

    return choose


def test_a_store_that_misbehaves_gives_the_same_batches_or_one_line(
    store: ObjectStore,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[[str, int], None],
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.3)
    monkeypatch.setattr("s3fs.core.asyncio.sleep", lambda seconds, sleep=s3fs.core.asyncio.sleep: sleep(seconds / 20))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    url, entries = store.upload(data_dir, tmp_path.name), Manifest.load(data_dir).splits["train"]
    number, ends = cases(8, 100), {"the same batches": 0, "a line": 0}
    for case in range(number):
        rng = random.Random(case)
        flags: dict[str, Any] = {"batch_size": rng.choice([2, 7, 16]), "group_events": rng.choice([440, 10**6])}
        cache = tmp_path / str(case)
        folder = open_folder(url, cache_dir=cache, cache_bytes=rng.choice(["12KB", "1MB"]))
        there = make_loader(folder, fetch_ahead=rng.choice([0, 2, 4]), prefetch=rng.choice([0, 2]), **flags)
        store.choose = misbehave(case, rng.choice([0.02, 0.1, 0.3]))
        expected, batches = list(make_loader(data_dir, **flags)), []
        try:
            batches.extend(there)
            ends["the same batches"] += 1
        except UserError as error:
            (named,) = [entry for entry in entries if f"{url}/{entry.path}: " in str(error)]
            assert "\n" not in str(error), named
            ends["a line"] += 1
        assert not [thread.name for thread in threading.enumerate() if thread.name in ("fetch", "prefetch")]
        assert not [path.name for path in cache.iterdir() if path.name.endswith(PART_SUFFIX)]
        store.choose = lambda method, key: "ok"
        if there.epoch == 0:  # it failed, and goes on where it was
            assert len(batches) == there.cursor
            batches.extend(itertools.islice(there, len(expected) - len(batches)))
        for batch, other in zip(batches, expected, strict=True):
            assert_equal(batch, other)
    assert min(ends.values()) > 0, ends
    tried("a store that misbehaves while shards are fetched ahead", number)
