"""The loader over a folder elsewhere: the first step waits for its own shards, and batches are those of a disk."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import make_loader
from pipeline.dataset.manifest import Manifest
from pipeline.schema import UserError
from pipeline.storage import ahead
from pipeline.storage.folder import File, Folder
from tests.data_dirs import Patient, write_data_dir
from tests.faults.conftest import cases
from tests.pipeline.loading.test_batch import assert_equal
from tests.pipeline.loading.test_loader import ids


class Elsewhere(Folder):
    """The folder at a path, whose shards come when they are allowed to; ``asked`` has their names in order."""

    room = 1 << 30

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[str] = []
        self.failing: set[str] = set()
        self.held: set[str] = set()
        self._changed = threading.Condition()

    @contextmanager
    def local_file(self, file: File, cancelled: threading.Event | None = None) -> Iterator[Path]:
        name = file.name
        with self._changed:
            self.asked.append(name)
            assert self._changed.wait_for(lambda: name not in self.held, timeout=60)
        if name in self.failing:
            raise UserError(f"{name}: the store does not give it")
        with super().local_file(file) as path:
            yield path

    def allow(self, names: set[str]) -> None:
        with self._changed:
            self.held -= names
            self._changed.notify_all()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, patients: list[Patient]) -> Path:
    """The 53 patients in 11 shards that are alike."""
    return write_data_dir(tmp_path_factory.mktemp("data"), {"train": patients}, dealt=True)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("fetch", "prefetch")]


def shards_of_batches(data_dir: Path, **flags: Any) -> list[set[str]]:
    """The paths of the shards in which the patients of each batch of an epoch lie."""
    entries = Manifest.load(data_dir).splits["train"]
    loaders = {
        entry.path: make_loader(data_dir, quarantined=[other.path for other in entries if other != entry])
        for entry in entries
    }
    shard_of = {name: path for path, loader in loaders.items() for batch in ids(loader) for name in batch}
    return [{shard_of[name] for name in batch} for batch in ids(make_loader(data_dir, **flags))]


@settings(max_examples=cases(15, 60))
@given(
    skipped=st.integers(0, 12),
    flags=st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 20),
            "group_events": st.sampled_from([440, 10**6]),
            "max_sequence_length": st.none() | st.integers(1, 60),
            "truncate": st.sampled_from(["earliest", "random"]),
            "shuffle": st.booleans(),
            "world_size": st.integers(1, 3),
        }
    ),
    how=st.fixed_dictionaries({"prefetch": st.sampled_from([0, 2]), "fetch_ahead": st.integers(0, 5)}),
)
def test_batches_and_places_are_those_of_a_disk_also_after_a_resume(
    data_dir: Path, skipped: int, flags: dict[str, Any], how: dict[str, int]
) -> None:
    def note(batch: Any, place: Any) -> Any:
        return batch, place.counts, place.step, place.global_batch().set_size.tolist()

    here = make_loader(data_dir, transform=note, **flags)
    stream = iter(here)
    for _ in range(min(skipped, len(here) - 1)):
        next(stream)
    there = make_loader(Elsewhere(data_dir), transform=note, **flags, **how)
    there.load_state_dict(here.state_dict())
    for remaining in (stream, here):  # the rest of the epoch, and the next one
        for (batch, *said), (expected, *other) in zip(there, remaining, strict=True):
            assert_equal(batch, expected)
            assert said == other
    assert there.state_dict() == here.state_dict()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("group_events", [440, 10**6])
@pytest.mark.parametrize("first", [0, 9])
def test_a_step_waits_for_the_shards_of_batches_so_far_and_no_other(
    data_dir: Path, prefetch: int, group_events: int, first: int
) -> None:
    flags = {"batch_size": 2, "group_events": group_events}
    needed = shards_of_batches(data_dir, **flags)
    near = make_loader(data_dir, **flags)
    stream = iter(near)
    for _ in range(first):
        next(stream)
    folder = Elsewhere(data_dir)
    loader = make_loader(folder, prefetch=prefetch, fetch_ahead=20, **flags)
    loader.load_state_dict(near.state_dict())
    folder.held = {entry.path for entry in loader.manifest.splits["train"]}
    folder.asked.clear()
    there = iter(loader)
    later = threading.Timer(0.02, folder.allow, [needed[first]])  # when threads that read wait for one another
    later.start()
    assert_equal(next(there), next(stream))
    later.join()
    assert len(folder.held) >= 9, "one or two have come"
    asked = [name for name in folder.asked if name in set().union(*needed[first:])]
    order = list(dict.fromkeys(name for shards in needed[first:] for name in sorted(shards)))
    firsts = len(needed[first])
    assert set(asked[:firsts]) == needed[first] == set(order[:firsts]), "those of the first batch come first"
    folder.allow(set(folder.held))
    for batch, expected in zip(there, stream, strict=True):
        assert_equal(batch, expected)
    shards = [name for name in folder.asked if name.startswith("train/")]
    assert group_events == 440 or len(shards) == len(set(shards)) == 11, "each of one group is fetched once"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_is_raised_at_the_first_batch_that_needs_its_shard(data_dir: Path, prefetch: int) -> None:
    flags = {"batch_size": 2}
    needed = shards_of_batches(data_dir, **flags)
    late = next(name for name in sorted(needed[-1] | needed[9], reverse=True) if name not in set().union(*needed[:3]))
    step = next(number for number, shards in enumerate(needed) if late in shards)
    folder = Elsewhere(data_dir)
    folder.failing = {late}
    loader, batches = make_loader(folder, prefetch=prefetch, **flags), []
    with pytest.raises(UserError, match=rf"{late}: the store does not give it") as caught:
        batches.extend(loader)
    assert "\n" not in str(caught.value)
    assert loader.cursor == len(batches) == step > 2
    folder.failing.clear()
    batches.extend(loader)
    for batch, expected in zip(batches, make_loader(data_dir, **flags), strict=True):
        assert_equal(batch, expected)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("group_events", [440, 10**6])
def test_an_interrupt_does_not_wait_for_a_silent_store(
    data_dir: Path, group_events: int, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "GRACE_SECONDS", 0.01)
    folder = Elsewhere(data_dir)
    loader = make_loader(folder, batch_size=2, group_events=group_events, prefetch=prefetch)
    folder.held = {entry.path for entry in loader.manifest.splits["train"]}
    main = threading.main_thread().ident
    assert main is not None
    interrupt = threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT])
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
    folder.allow(set(folder.held))
    while "fetch" in [thread.name for thread in threading.enumerate()]:
        time.sleep(0.001)


@pytest.mark.parametrize("group_events", [440, 10**6])
def test_leaving_an_iteration_does_not_wait_for_a_silent_store(
    data_dir: Path, group_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "GRACE_SECONDS", 0.01)
    flags = {"batch_size": 2, "group_events": group_events}
    needed = shards_of_batches(data_dir, **flags)
    folder = Elsewhere(data_dir)
    loader = make_loader(folder, **flags)
    folder.held = {entry.path for entry in loader.manifest.splits["train"]} - needed[0]
    stream = iter(loader)
    next(stream)
    stream.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "prefetch" not in names
    folder.allow(set(folder.held))
    while "fetch" in [thread.name for thread in threading.enumerate()]:
        time.sleep(0.001)
    assert loader.cursor == 1
    for batch, expected in zip(loader, list(make_loader(data_dir, **flags))[1:], strict=True):
        assert_equal(batch, expected)
