"""Reading ahead of a folder that notes what is fetched, and that a test can let wait or fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schema import UserError
from pipeline.storage import ahead
from pipeline.storage.ahead import AheadFolder
from pipeline.storage.folder import File, Folder


class Store(Folder):
    """A folder elsewhere, whose files are names alone.

    Attributes:
        begun, in_use: files whose fetch began, in order; those that have come and are not released.
        most: the most files, and the most bytes, that were fetched or in use at once.
        silent: files that do not come until ``answer`` is set, or the fetch is cancelled between two requests.
        failing: files that do not come at all.
    """

    def __init__(self, room: int | None) -> None:
        super().__init__("store")
        self.room = room
        self.begun: list[str] = []
        self.in_use: dict[str, int] = {}
        self.most = (0, 0)
        self.silent: set[str] = set()
        self.failing: set[str] = set()
        self.answer, self._lock = threading.Event(), threading.Lock()

    @contextmanager
    def local_file(self, file: File, cancelled: threading.Event | None = None) -> Iterator[Path]:
        name = file.name
        with self._lock:
            self.begun.append(name)
            self.in_use[name] = file.num_bytes or 0
            self.most = (max(self.most[0], len(self.in_use)), max(self.most[1], sum(self.in_use.values())))
        try:
            if name in self.silent:
                assert self.answer.wait(timeout=60)
            if cancelled is not None and cancelled.is_set():
                raise UserError("cancelled")
            if name in self.failing:
                raise UserError(f"{name} is not to be had")
            yield Path(name)
        finally:
            with self._lock:
                del self.in_use[name]


def files_of(sizes: list[int]) -> list[File]:
    return [File(f"file {number}", "", size) for number, size in enumerate(sizes)]


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 4), st.integers(0, 30))
def test_each_file_comes_once_in_order_and_within_the_bounds(sizes: list[int], depth: int, room: int) -> None:
    store, files = Store(room), files_of(sizes)
    with closing(AheadFolder(store, depth)) as folder:
        folder.announce(files[:5])
        folder.announce(files[3:])  # some of them again
        for file in files:
            with folder.local_file(file) as path:
                assert path == Path(file.name)
                assert file.name in store.in_use
            assert file.name not in store.in_use, "it is released when it has been read"
    assert sorted(store.begun) == sorted(file.name for file in files)
    assert store.most[0] <= 1 + depth
    assert store.most[1] <= max(room, *sizes, 0)
    assert not fetch_threads()


def test_as_many_files_as_allowed_are_fetched_at_once_and_wait(tmp_path: Path) -> None:
    store, files = Store(100), files_of([1] * 6)
    store.silent = {file.name for file in files}
    with closing(AheadFolder(store, 3)) as folder:
        folder.announce(files)
        assert len(fetch_threads()) == 3, "nobody has asked"
        store.silent.clear()
        store.answer.set()
        with folder.local_file(files[0]):
            assert len(fetch_threads()) == 1 + 3
        with folder.local_file(files[5]):  # against the order
            assert len(fetch_threads()) == 1 + 3
        assert sorted(store.begun) == [f"file {number}" for number in (0, 1, 2, 3, 5)]


def test_without_ahead_a_file_is_fetched_when_it_is_asked_for() -> None:
    store, files = Store(100), files_of([1] * 3)
    with closing(AheadFolder(store, 0)) as folder:
        folder.announce(files)
        for number, file in enumerate(files):
            assert len(store.begun) == number
            with folder.local_file(file):
                pass


def test_an_error_comes_when_its_file_is_asked_for_and_the_file_can_be_asked_for_again() -> None:
    store, files = Store(100), files_of([1] * 3)
    store.failing = {"file 1"}
    with closing(AheadFolder(store, 2)) as folder:
        folder.announce(files)
        with folder.local_file(files[0]):
            pass
        with pytest.raises(UserError, match="file 1 is not to be had"), folder.local_file(files[1]):
            pass
        with folder.local_file(files[2]):
            pass
        store.failing.clear()
        with folder.local_file(files[1]) as path:
            assert path == Path("file 1")
    assert not store.in_use


def test_a_folder_on_this_machine_needs_no_thread() -> None:
    store, files = Store(None), files_of([1] * 3)
    with closing(AheadFolder(store, 2)) as folder:
        folder.announce(files)
        assert not store.begun
        with folder.local_file(files[0]):
            assert not fetch_threads()
    with pytest.raises(UserError, match="store/file 1: is not needed any more"), folder.local_file(files[1]):
        pass


def test_closing_wakes_who_waits_and_leaves_a_silent_request_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "GRACE_SECONDS", 0.01)
    store, files, said = Store(100), files_of([1] * 3), list[str]()
    store.silent = {"file 0", "file 2"}
    folder = AheadFolder(store, 2)
    folder.announce(files)

    def read() -> None:
        try:
            with folder.local_file(files[0]):
                said.append("it came")
        except UserError as error:
            said.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    while "file 2" not in store.in_use:
        pass
    folder.close()
    reader.join(timeout=30)
    assert said == ["store/file 0: is not needed any more"]
    left = fetch_threads()
    assert {thread.file.name for thread in left if isinstance(thread, ahead._Fetch)} == store.silent
    store.answer.set()
    for thread in left:
        thread.join(timeout=30)
    assert not store.in_use
    with pytest.raises(UserError, match="is not needed"), folder.local_file(files[1]):
        pass
