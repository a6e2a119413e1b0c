from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from threading import Event
from unittest.mock import patch

import pytest

import preprocess
from pipeline.prepare.executors import run_tasks
from tests.processes import CONTEXT, ROOT

PATIENTS = ["synthetic", "--num_patients", "600", "--events_per_shard", "20000", "--shard_format", "both"]


def prepare(arguments: Sequence[str]) -> int:
    """``preprocess.main`` with many small pieces, and with workers that import nothing."""
    with (
        patch("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 25}),
        patch("pipeline.prepare.executors.get_context", lambda _: CONTEXT),
    ):
        return preprocess.main(arguments)


@contextmanager
def process(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__WORKER__DAEMON": "True"}
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.mark.parametrize("num_tasks", [0, 1, 3, 9])
def test_few_tasks_are_submitted_at_a_time_and_come_in_order(num_tasks: int) -> None:
    with patch("pipeline.prepare.executors.MAX_SUBMITTED", 3), ThreadPoolExecutor(2) as executor:
        submitted, submit = [], executor.submit
        with patch.object(executor, "submit", lambda *call: (submitted.append(call), submit(*call))[1]):
            results = run_tasks(executor, "square", pow, {number: (number, 2) for number in range(num_tasks)})
            for number, result in enumerate(results):
                assert result == (number, number**2)
                assert len(submitted) <= number + 3
    assert len(submitted) == num_tasks


def test_a_task_that_fails_takes_back_those_that_wait() -> None:
    has_failed, begun = Event(), list[int]()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ZeroDivisionError
        has_failed.wait()

    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(ZeroDivisionError):
            next(run_tasks(executor, "fail", work, {number: (number,) for number in range(9)}))
        has_failed.set()
    assert begun in ([0], [0, 1])


def sleep_and_tell(file: Path) -> None:
    parent = parent_process()
    assert parent is not None
    file.write_text(str(os.getpid()))
    time.sleep(60)


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.prepare.executors import ExecutionOptions, open_executor\n"
        "from tests.pipeline.prepare.test_executors import sleep_and_tell\n"
        "if __name__ == '__main__':\n"
        "    with open_executor(ExecutionOptions(workers=2), 2) as executor:\n"
        "        executor.submit(sleep_and_tell, Path(sys.argv[1])).result()\n"
    )
    told = tmp_path / "pid"
    with process(sys.executable, "-c", program, told) as running:
        while not (told.exists() and told.read_text()):
            assert running.poll() is None
            time.sleep(0.02)
        running.kill()
    worker = int(told.read_text())
    for _ in range(500):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.02)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker outlives its parent")
