"""Files fetched before they are needed, by a few threads, so that whoever reads them seldom waits for a store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pipeline.schema import UserError
from pipeline.storage.folder import File, Folder

GRACE_SECONDS: Final = 2.0
"""How long the end of a run waits for requests under way.  A store that is silent is not waited for any longer: its
thread ends with the request or with the process, and takes its temporary file along."""


class AheadFolder(Folder):
    """A folder whose files are fetched and verified ahead of need, in the order in which they are announced.

    At most ``depth`` files are fetched or wait that have not been asked for, and no more than fit the cache together
    with those in use.  A file that is asked for is fetched in any case.  What goes wrong is raised when the file is
    asked for.  Files of a folder on this machine are read as ever, without a thread.

    A file has one reader at a time.  Close the folder in the process that made it; whoever waits for a file then gets a
    UserError, and no thread is left.
    """

    def __init__(self, folder: Folder, depth: int) -> None:
        super().__init__(str(folder))
        self._folder, self._depth = folder, depth
        self.repair_advice = folder.repair_advice
        self._announced: dict[str, File] = {}
        self._fetches: dict[str, _Fetch] = {}
        self._changed, self._cancelled, self._process = threading.Condition(), threading.Event(), os.getpid()

    def announce(self, files: Iterable[File]) -> None:
        """Say which files will be asked for, and in which order, after those that were announced before."""
        if self._folder.room is not None:
            with self._changed:
                self._announced |= {file.name: file for file in files if file.name not in self._fetches}
                self._fetch_more()

    def read(self, name: str) -> bytes:
        return self._folder.read(name)

    @contextmanager
    def local_file(self, file: File, cancelled: threading.Event | None = None) -> Iterator[Path]:
        if self._folder.room is None and not self._cancelled.is_set():
            with self._folder.local_file(file) as path:
                yield path
            return
        with self._changed:
            if self._cancelled.is_set():
                raise UserError(f"{self}/{file.name}: is not needed any more")
            fetch = self._ask_for(file)
            self._changed.wait_for(lambda: fetch.has_ended or self._cancelled.is_set())
        try:
            if fetch.error is not None:
                raise fetch.error
            if fetch.path is None:
                raise UserError(f"{self}/{file.name}: is not needed any more")
            yield fetch.path
        finally:
            self._release(fetch)

    def close(self) -> None:
        """Stop fetching and wait for the threads, but for those whose request the store does not answer."""
        if os.getpid() != self._process:  # a fork took along the locks, and no thread
            return
        with self._changed:
            self._cancelled.set()
            fetches = list(self._fetches.values())
            self._changed.notify_all()
        for fetch in fetches:
            fetch.released.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for fetch in fetches:
            fetch.join(max(deadline - time.monotonic(), 0))

    def _ask_for(self, file: File) -> _Fetch:
        """Return the fetch of a file, which begins if it has not; call it under the lock."""
        if file.name not in self._fetches:
            self._announced.pop(file.name, None)
            self._start(file)
        fetch = self._fetches[file.name]
        fetch.is_asked_for = True
        self._fetch_more()
        return fetch

    def _release(self, fetch: _Fetch) -> None:
        """Let go of a file that was read, and fetch others in its place."""
        fetch.released.set()
        if not self._cancelled.is_set():
            fetch.join()
        with self._changed:
            del self._fetches[fetch.file.name]
            self._fetch_more()

    def _fetch_more(self) -> None:
        """Fetch announced files as far as they may be ahead; call it under the lock."""
        while self._announced and not self._cancelled.is_set():
            file = next(iter(self._announced.values()))
            ahead = sum(not fetch.is_asked_for for fetch in self._fetches.values())
            used = sum(fetch.file.num_bytes or 0 for fetch in self._fetches.values())
            if ahead >= self._depth or used + (file.num_bytes or 0) > (self._folder.room or 0):
                return
            del self._announced[file.name]
            self._start(file)

    def _start(self, file: File) -> None:
        self._fetches[file.name] = fetch = _Fetch(self._folder, file, self._changed, self._cancelled)
        fetch.start()


class _Fetch(threading.Thread):
    """Fetches a file and keeps it in the cache until it is released.

    Attributes:
        path, error: of the file, or why there is none; both None until it has ended.
        is_asked_for: whether somebody reads the file or waits for it.
    """

    def __init__(self, folder: Folder, file: File, changed: threading.Condition, cancelled: threading.Event) -> None:
        super().__init__(name="fetch", daemon=True)
        self.file, self._folder, self._changed, self._cancelled = file, folder, changed, cancelled
        self.path: Path | None = None
        self.error: BaseException | None = None
        self.is_asked_for, self.released = False, threading.Event()

    @property
    def has_ended(self) -> bool:
        return self.path is not None or self.error is not None

    def run(self) -> None:
        try:
            with self._folder.local_file(self.file, self._cancelled) as path:
                self._end(path, None)
                self.released.wait()
        except BaseException as error:
            self._end(None, error)

    def _end(self, path: Path | None, error: BaseException | None) -> None:
        with self._changed:
            self.path, self.error = path, error
            self._changed.notify_all()
