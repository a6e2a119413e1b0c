from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import pytest

import preprocess
from pipeline.prepare.cluster import DaskCluster, open_dask
from pipeline.prepare.executors import ExecutionOptions, open_executor
from pipeline.schema import UserError
from tests.pipeline.prepare import cluster_tasks
from tests.pipeline.prepare.test_build import shard_bytes
from tests.pipeline.prepare.test_executors import PATIENTS, prepare, process
from tests.processes import ROOT, Command

needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="distributed, an optional extra, is missing")

AddWorker: TypeAlias = Callable[..., subprocess.Popen[bytes]]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A scheduler's file; a task fails when two workers died with it."""
    file = tmp_path_factory.mktemp("scheduler") / "scheduler.json"
    arguments = ["--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file]
    with (
        patch.dict(os.environ, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1"),
        process(sys.executable, "-m", "distributed.cli.dask_scheduler", *arguments),
    ):
        wait_for(file.exists)
        yield file


@pytest.fixture
def add_worker(scheduler: Path, tmp_path: Path) -> Iterator[AddWorker]:
    """Starts a worker of one thread on loopback, without a nanny unless it is asked for."""
    arguments = ["--scheduler-file", scheduler, "--nthreads", 1, "--no-dashboard", "--local-directory", tmp_path]
    with ExitStack() as stack:

        def add(*more: object) -> subprocess.Popen[bytes]:
            command = ["-m", "distributed.cli.dask_worker", *arguments, *(more or ["--no-nanny"])]
            return stack.enter_context(process(sys.executable, *command))

        yield add


@pytest.fixture
def cluster(scheduler: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaskCluster]:
    monkeypatch.setattr("pipeline.prepare.cluster.LOOK_SECONDS", 0.1)
    with open_dask(str(scheduler)) as opened:
        wait_for(lambda: not count_workers(opened))  # those of the test before
        yield opened


def count_workers(cluster: DaskCluster) -> int:
    return len(cluster.client.nthreads())


def run(cluster: DaskCluster, function: Callable[..., Any], *arguments: tuple[Any, ...]) -> dict[int, Any]:
    return dict(cluster.run("read", function, dict(enumerate(arguments)), {0: " (a.csv)"}))


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Waits for what it runs; asked for before a cluster, whose end ends that."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def begun(folder: Path) -> dict[int, list[int]]:
    """The processes that began each task, in their order."""
    return {int(file.stem): list(map(int, file.read_text().split())) for file in folder.glob("*.begun")}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("local") / "out"
    with patch("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 25}):
        assert preprocess.main([*PATIENTS, "--workers", "1", "--output", str(output)]) == 0
    return shard_bytes(output)


@needs_dask
def test_workers_write_the_bytes_of_one_process_also_when_one_is_killed(
    tmp_path: Path, cluster: DaskCluster, add_worker: AddWorker, local: dict[str, bytes]
) -> None:
    workers = [add_worker(), add_worker()]
    journal = tmp_path / "killed" / ".preprocess" / "journal" / "read"
    command = Command(prepare, *PATIENTS, "--executor", cluster.name, "--output", tmp_path / "killed")
    wait_for(lambda: len(list(journal.glob("*.json"))) >= 10)
    workers[0].send_signal(signal.SIGKILL)
    assert command.poll() is None
    _, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    assert shard_bytes(tmp_path / "killed") == local
    stages = cluster.client.run_on_scheduler(cluster_tasks.list_stages)
    assert stages == ["gather_moments", "gather_scales", "read", "sort", "write"]


@needs_dask
def test_an_adaptive_cluster_that_begins_with_no_worker_writes_the_bytes_of_one_process(
    tmp_path: Path, local: dict[str, bytes]
) -> None:
    file = tmp_path / "address"
    with process(sys.executable, cluster_tasks.__file__, file):
        wait_for(lambda: file.exists() and file.read_text())
        name = file.read_text().replace("tcp://", "dask://")
        command = Command(prepare, *PATIENTS, "--executor", name, "--output", tmp_path / "out")
        _, said = command.communicate(timeout=60)
    assert command.returncode == 0, said
    assert shard_bytes(tmp_path / "out") == local


@pytest.mark.parametrize("num_tasks", [2, 6])
@needs_dask
def test_workers_that_join_late_get_tasks(
    tmp_path: Path,
    background: ThreadPoolExecutor,
    cluster: DaskCluster,
    add_worker: AddWorker,
    capsys: pytest.CaptureFixture[str],
    num_tasks: int,
) -> None:
    tasks = [(tmp_path, number) for number in range(num_tasks)]
    results = background.submit(run, cluster, cluster_tasks.tell_worker, *tasks)
    said = ""

    def read_said() -> str:
        nonlocal said
        said += capsys.readouterr().err
        return said

    wait_for(read_said)
    for number in (1, 2):
        add_worker()
        wait_for(lambda number=number: len(begun(tmp_path)) == number)
    (tmp_path / "go").touch()
    assert len(set(results.result(timeout=60).values())) == 2
    assert read_said() == f"--executor {cluster.name}: read waits: no worker is there; it goes on when one joins\n"


@pytest.mark.parametrize("way", ["killed", "retired"])
@needs_dask
def test_tasks_that_a_worker_has_not_done_when_it_leaves_are_done_by_others(
    tmp_path: Path,
    background: ThreadPoolExecutor,
    cluster: DaskCluster,
    add_worker: AddWorker,
    capsys: pytest.CaptureFixture[str],
    way: str,
) -> None:
    workers = {add_worker("--no-nanny", "--name", name).pid: name for name in "ab"}
    wait_for(lambda: count_workers(cluster) == 2)
    (tmp_path / "0.go").touch()
    tasks = [(tmp_path, number) for number in range(6)]
    results = background.submit(run, cluster, cluster_tasks.tell_worker, *tasks)
    wait_for(
        lambda: len(begun(tmp_path)) == 3 and not any(cluster.client.who_has().values())
    )  # the first is done and forgotten
    (left,) = begun(tmp_path)[0]
    (stays,) = workers.keys() - {left}
    if way == "killed":
        os.kill(left, signal.SIGKILL)
    else:
        cluster.client.retire_workers(names=[workers[left]])
    wait_for(lambda: count_workers(cluster) == 1)
    (tmp_path / "go").touch()
    assert results.result(timeout=60) == {0: left} | dict.fromkeys(range(1, 6), stays)
    assert begun(tmp_path)[0] == [left]
    assert "read: workers that left or died: 1; tasks of theirs that others did: " in capsys.readouterr().err


@needs_dask
def test_runs_that_share_a_cluster_do_not_share_tasks(
    tmp_path: Path, background: ThreadPoolExecutor, cluster: DaskCluster, add_worker: AddWorker
) -> None:
    for name in ("first", "second"):
        add_worker()
        (tmp_path / name).mkdir()
    (tmp_path / "second" / "go").touch()
    first = background.submit(run, cluster, cluster_tasks.tell_worker, (tmp_path / "first", 0))
    wait_for(lambda: begun(tmp_path / "first"))
    with ThreadPoolExecutor(1) as other:
        second = other.submit(run, cluster, cluster_tasks.tell_worker, (tmp_path / "second", 0))
        try:
            second.result(timeout=20)
        finally:
            (tmp_path / "first" / "go").touch()
    assert first.result(timeout=60) != second.result()


@needs_dask
def test_a_task_with_which_every_worker_dies_ends_the_command_in_one_line(
    tmp_path: Path,
    cluster: DaskCluster,
    add_worker: AddWorker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_worker("--nanny", "--memory-limit", 0)
    wait_for(lambda: count_workers(cluster) == 1)
    monkeypatch.setattr("pipeline.prepare.stages.spill_piece", cluster_tasks.die)
    arguments = ["synthetic", "--num_patients", "5", "--executor", cluster.name, "--output", str(tmp_path / "out")]
    assert preprocess.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"preprocess.py: --executor {cluster.name}: workers died with task 0 (synthetic) of read, 2 in all, most "
        "likely for want of memory (no limit); give workers more memory or fewer threads, and the same command goes on "
        "from here, or start afresh with smaller --events_per_shard"
    )


@needs_dask
def test_a_task_that_takes_too_much_memory_is_named_alone_with_what_it_took(
    cluster: DaskCluster, add_worker: AddWorker
) -> None:
    add_worker("--nanny", "--memory-limit", 400 << 20)
    with pytest.raises(ChildProcessError) as caught:
        run(cluster, cluster_tasks.fill_memory, (400 << 20,), (0,))
    pattern = r".*workers died with task 0 \(a.csv\) of read, 2 in all, one at 0\.\d\d GiB of a limit of 0.39 GiB; .*"
    assert re.fullmatch(pattern, str(caught.value))


@needs_dask
def test_workers_that_are_all_paused_are_told_and_waited_for(
    tmp_path: Path,
    background: ThreadPoolExecutor,
    cluster: DaskCluster,
    add_worker: AddWorker,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_worker("--no-nanny", "--memory-limit", 32 << 20)  # less than it takes without a task
    wait_for(lambda: [worker["status"] for worker in cluster.client.scheduler_info()["workers"].values()] == ["paused"])
    (tmp_path / "go").touch()
    results = background.submit(run, cluster, cluster_tasks.tell_worker, (tmp_path, 0))
    said = "all 1 workers are paused, near a limit of 0.03 GiB; give them more memory or fewer threads"
    wait_for(lambda: capsys.readouterr().err == f"--executor {cluster.name}: read waits: {said}\n")
    other = add_worker()
    assert results.result(timeout=60) == {0: other.pid}


@needs_dask
def test_a_task_that_raises_is_done_once_a_run(tmp_path: Path, cluster: DaskCluster, add_worker: AddWorker) -> None:
    add_worker()
    for number in (1, 2):
        with pytest.raises(ZeroDivisionError):
            run(cluster, cluster_tasks.fail, (tmp_path,))
        assert (tmp_path / "failed").read_text() == number * "once\n"


@needs_dask
def test_a_scheduler_that_ends_is_one_line(tmp_path: Path, background: ThreadPoolExecutor) -> None:
    address = tmp_path / "address"
    with process(sys.executable, cluster_tasks.__file__, address) as running:
        wait_for(lambda: address.exists() and address.read_text())
        with open_dask(address.read_text().replace("tcp://", "dask://")) as cluster:
            results = background.submit(run, cluster, cluster_tasks.tell_worker, (tmp_path, 0))
            wait_for(lambda: begun(tmp_path))
            running.kill()
            with pytest.raises(
                ChildProcessError, match="the scheduler has ended, or dropped the tasks of read; start it"
            ):
                results.result(timeout=60)


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
