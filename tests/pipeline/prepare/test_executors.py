from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from unittest.mock import patch

import pytest

import preprocess
from pipeline.prepare.executors import ExecutionOptions, open_executor
from pipeline.schema import UserError
from tests.pipeline.prepare.test_build import shard_bytes
from tests.processes import CONTEXT, ROOT, Command

PATIENTS = ["synthetic", "--num_patients", "600", "--events_per_shard", "20000", "--shard_format", "both"]


def prepare(arguments: Sequence[str]) -> int:
    """``preprocess.main`` with many small pieces, and with workers that import nothing."""
    with (
        patch("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 25}),
        patch("pipeline.prepare.executors.get_context", lambda _: CONTEXT),
    ):
        return preprocess.main(arguments)


needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="distributed, an optional extra, is missing")


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


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    """A scheduler's file, and two workers, all separate processes on loopback."""
    file = tmp_path / "scheduler.json"
    with ExitStack() as stack:
        scheduler = ["--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file]
        stack.enter_context(process(sys.executable, "-m", "distributed.cli.dask_scheduler", *scheduler))
        worker: list[object] = ["--scheduler-file", file, "--nthreads", 1, "--no-nanny", "--no-dashboard"]
        worker += ["--local-directory", tmp_path]
        while not file.exists():
            time.sleep(0.05)
        workers = [
            stack.enter_context(process(sys.executable, "-m", "distributed.cli.dask_worker", *worker)) for _ in range(2)
        ]
        yield file, workers


@needs_dask
def test_dask_workers_write_the_bytes_of_one_process_also_when_one_is_killed(
    tmp_path: Path, cluster: tuple[Path, list[subprocess.Popen[bytes]]]
) -> None:
    file, workers = cluster
    with patch("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 25}):
        assert preprocess.main([*PATIENTS, "--workers", "1", "--output", str(tmp_path / "local")]) == 0
    journal = tmp_path / "killed" / ".preprocess" / "journal" / "read"
    run = Command(prepare, *PATIENTS, "--executor", file, "--output", tmp_path / "killed")
    while len(list(journal.glob("*.json"))) < 10:
        assert run.poll() is None
        time.sleep(0.01)
    workers[0].send_signal(signal.SIGKILL)
    assert run.poll() is None
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "local")


@pytest.mark.parametrize("name", ["dask://127.0.0.1:1", "no_such_file.json"])
@needs_dask
def test_a_scheduler_that_is_not_there_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "0.2s")
    program = (
        "from pipeline.prepare.executors import ExecutionOptions, open_executor\n"
        "from pipeline.schema import UserError\n"
        "try:\n"
        f"    open_executor(ExecutionOptions(executor={name!r}), 1).__enter__()\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"--executor {name}: ")
    assert done.stdout.count("\n") == 1


def test_dask_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    options = ExecutionOptions(executor="dask://127.0.0.1:1")
    with pytest.raises(UserError, match="needs Dask; pip install"), open_executor(options, 1):
        pass


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
