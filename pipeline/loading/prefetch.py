"""Items that a thread makes in advance."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    items: Generator[T, None, None], depth: int, stop: Callable[[], None] = lambda: None
) -> Generator[T, None, None]:
    """Yield ``items``, which a thread makes at most ``depth`` in advance; with 0 each is made when it is asked for.

    An exception in the thread is raised where its item would have come.  Closing or dropping the generator, or an
    interrupt while it waits, ends the thread, which a process that is forked meanwhile does not have; ``stop`` is
    called first, so that the thread does not wait for anything.
    """
    if depth == 0:
        yield from items
        return
    process = os.getpid()
    ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()  # an item, a failure, or the end
    free = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        try:
            free.acquire()
            with closing(items):
                for item in items:
                    ready.put((item,))
                    free.acquire()
                    if closed.is_set():
                        return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (message := ready.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            free.release()
            yield message[0]
    finally:
        if os.getpid() == process:  # after a fork the locks may be held by a thread that does not exist
            closed.set()
            stop()
            free.release()
            thread.join()
