"""Commands in processes of their own that start without imports: a server that has imported everything forks them.

A process that imports PyTorch, Polars and matplotlib anew takes three seconds of a free core, and most tests that need
another process need it to be killed, stopped or limited, not to be new.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any
from unittest import mock

from tests.pages import draw_nothing

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.training.runs", "preprocess", "pipeline.tasks", "sklearn.calibration", "sklearn.metrics", "pytest"]
)


def start_server() -> None:
    """Start what forks the processes of ``CONTEXT``, if it does not run; its threads would be forked, so it has one."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()


class Output:
    """A file without a name, to which another process can be sent to write; there it is a descriptor."""

    def __init__(self) -> None:
        self._file, name = tempfile.mkstemp()
        os.unlink(name)
        weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[Callable[..., int], tuple[Any]]:
        return _receive, (reduction.DupFd(self._file),)

    def read(self) -> str:
        return os.pread(self._file, os.fstat(self._file).st_size, 0).decode()  # leaves the place of the writer


def _receive(sent: Any) -> int:
    return int(sent.detach())


class Command:
    """A process that ends with the exit code of ``main(arguments)``; in most things like a ``subprocess.Popen``.

    Its environment is that in which the server started, and what it is given.
    """

    def __init__(self, main: Callable[[Sequence[str]], int], *arguments: object, **environment: str) -> None:
        self._out, self._err = Output(), Output()
        words = [str(word) for word in arguments]
        self._process = CONTEXT.Process(target=_run, args=(main, words, environment, self._out, self._err))
        start_server()
        self._process.start()
        atexit.register(self._process.kill)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def read_output(self) -> str:
        """What it has printed until now."""
        return self._out.read()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it printed and what it said of errors."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0, self._out.read(), self._err.read())
        return self._out.read(), self._err.read()


def _run(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], environment: dict[str, str], out: int, err: int
) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ |= environment
    os.chdir(ROOT)
    with draw_nothing():
        sys.exit(main(arguments))
