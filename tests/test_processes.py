"""What tests of commands rely on: a forked command ends, fails, prints and dies as one that was started anew."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from tests.processes import Command


def speak(arguments: Sequence[str]) -> int:
    print("said", *arguments)
    print("wrong", file=sys.stderr)
    return 3


def fail(_: Sequence[str]) -> int:
    raise ZeroDivisionError


def hang(_: Sequence[str]) -> int:
    print("hangs", flush=True)
    time.sleep(60)
    return 0


def test_exit_code_and_output() -> None:
    command = Command(speak, 1, "b")
    assert command.communicate(timeout=60) == ("said 1 b\n", "wrong\n")
    assert command.returncode == 3


def test_a_traceback_is_an_error() -> None:
    command = Command(fail)
    assert "ZeroDivisionError" in command.communicate(timeout=60)[1]
    assert command.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    command = Command(hang)
    with pytest.raises(subprocess.TimeoutExpired):
        command.communicate(timeout=0.01)
    assert command.poll() is None
    while not command.read_output().endswith("\n"):  # it may come in two pieces
        time.sleep(0.01)
    command.send_signal(number)
    assert command.communicate(timeout=60) == ("hangs\n", "")
    assert command.returncode == -number
