"""Items made ahead by a thread."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """``items``, made by a thread that is at most ``depth`` of them ahead; 0 makes each when it is asked for.

    An exception in the thread is raised where its item would have come.  Closing, or dropping, the generator ends the
    thread.
    """
    if depth == 0:
        yield from items
        return
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
        closed.set()
        free.release()
        thread.join()
