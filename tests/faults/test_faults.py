"""Full disks, files that cannot be written, too little memory, killed processes: one line, and the next run goes on."""

from __future__ import annotations

import importlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch

import preprocess
from pipeline.schema import REPORT_FILE, SUMMARY_FILE
from tests.data_dirs import make_patients, write_data_dir
from tests.faults import kill_training
from tests.faults.conftest import cases, full_only
from tests.processes import ROOT, Command

Tried = Callable[[str, int], None]

QUICK = [
    "--max_epochs=2",
    "--batch_size=6",
    "--warmup_steps=3",
    "--log_steps=1",
    "--checkpoint_steps=1",
    "--device=cpu",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def limited(arguments: Sequence[str]) -> int:
    """``main`` of a module under a limit of the system: its name, the limit's, and its size; 0 = none."""
    what, size, name, *given = arguments
    torch.set_num_threads(1)
    if int(size):
        used = psutil.Process().memory_info().vms if what == "RLIMIT_AS" else 0
        resource.setrlimit(getattr(resource, what), (used + int(size),) * 2)
    code: int = importlib.import_module(name).main(given)
    return code


def run(what: str, size: int, name: str, *given: object) -> tuple[int, str]:
    """The exit code and the last line that was said, under a limit of the system."""
    command = Command(limited, what, size, name, *given)
    _, said = command.communicate(timeout=300)
    assert "Traceback" not in said, said
    assert command.returncode is not None
    return command.returncode, (said.splitlines() or [""])[-1]


def content(folder: Path) -> dict[str, bytes]:
    skipped = (SUMMARY_FILE, REPORT_FILE)
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped
    }


PREPARE = ["synthetic", "--num_patients", "60", "--workers", "1", "--events_per_shard", "9000"]


def test_a_disk_that_fills_while_preparing(tmp_path: Path, tried: Tried) -> None:
    """No file may grow beyond a limit, as on a full disk; without it, the same command gives the same bytes."""
    assert run("RLIMIT_FSIZE", 0, "preprocess", *PREPARE, "--output", tmp_path / "whole")[0] == 0
    sizes = [path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    rng, number = random.Random(0), cases(2, 12)
    for case in range(number):
        out = tmp_path / str(case)
        status, line = run("RLIMIT_FSIZE", rng.randrange(100, max(sizes)), "preprocess", *PREPARE, "--output", out)
        assert status == 2
        assert line.startswith("preprocess.py: ")
        assert "File too large" in line
        assert run("RLIMIT_FSIZE", 0, "preprocess", *PREPARE, "--output", out)[0] == 0
        assert content(out) == content(tmp_path / "whole")
    tried("a disk full while preparing", number)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {
        name: make_patients([[1 + (7 * i + k) % 11 for k in range(1 + i % 6)] for i in range(count)], prefix=name)
        for name, count in {"train": 26, "valid": 12, "test": 12}.items()
    }
    return write_data_dir(tmp_path_factory.mktemp("data"), splits)


def test_a_disk_that_fills_while_training(data: Path, tmp_path: Path, tried: Tried) -> None:
    flags = ["--data_dir", data, *QUICK]
    number = cases(1, 6)
    for case in range(number):
        out = tmp_path / str(case)
        status, line = run("RLIMIT_FSIZE", 200_000 * (case + 1), "train", *flags, "--output_dir", out)
        assert status == 2
        assert line.startswith("train.py: ")
        assert "File too large" in line
        assert not list(out.rglob("*.tmp")), "no half of a file stays"
        assert run("RLIMIT_FSIZE", 0, "train", *flags, "--output_dir", out, "--resume")[0] == 0
    tried("a disk full while training", number)


def test_a_small_file_system_of_its_own(tmp_path: Path, tried: Tried) -> None:
    """A tmpfs of a few pages, where the system lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        status, line = run("RLIMIT_FSIZE", 0, "preprocess", *PREPARE, "--output", small / "out")
        assert status == 2
        assert "no space left on the disk; free some, and the same command goes on" in line
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        assert run("RLIMIT_FSIZE", 0, "preprocess", *PREPARE, "--output", small / "out")[0] == 0
        assert run("RLIMIT_FSIZE", 0, "preprocess", *PREPARE, "--output", tmp_path / "whole")[0] == 0
        assert content(small / "out") == content(tmp_path / "whole")
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        for name, given in (
            ("preprocess", [*PREPARE, "--output", small / "new"]),
            ("train", ["--data_dir", small / "out", *QUICK, "--output_dir", small / "run"]),
        ):
            status, line = run("RLIMIT_FSIZE", 0, name, *given)
            assert status == 2
            assert "Read-only file system" in line
    finally:
        subprocess.run(["umount", small], check=True)
    tried("a full and a read-only file system", 4)


def test_too_little_memory(data: Path, tmp_path: Path, tried: Tried) -> None:
    # Without a thread that prepares batches: glibc itself aborts a thread that it has no address space to unwind.
    flags = ["--data_dir", data, "--batch_size=26", "--preset=reference", "--max_epochs=1", "--prefetch=0"]
    sizes = [120, 1, 10, 30, 60, 100, 140, 200, 300, 400][: cases(1, 10)]  # where memory ends differs with each
    for size in sizes:
        status, line = run("RLIMIT_AS", size << 20, "train", *flags, "--output_dir", tmp_path / str(size))
        assert status == 2
        assert line.startswith("train.py: out of memory")
    tried("too little memory", len(sizes))


def test_a_killed_rank_ends_the_run_with_a_line(data: Path, tmp_path: Path, tried: Tried) -> None:
    number = cases(1, 5)
    for case in range(number):
        command = [
            sys.executable,
            "train.py",
            "--data_dir",
            str(data),
            "--output_dir",
            str(tmp_path / str(case)),
            *QUICK,
        ]
        process = subprocess.Popen(
            [*command, "--devices=2", "--max_epochs=200"], cwd=ROOT, env=ENVIRONMENT, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        last = tmp_path / str(case) / "checkpoints" / "last.pt"
        while not last.exists():
            assert process.poll() is None
            time.sleep(0.05)
        ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        ranks[case % len(ranks)].send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 2
        assert "was killed, most likely for want of memory" in said.splitlines()[-1]
        assert "--resume" in said.splitlines()[-1]
    tried("a killed rank of a run", number)


@full_only
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_training_killed_at_random_moments(ranks: str, tried: Tried) -> None:
    command = [sys.executable, "-m", "tests.faults.kill_training", "--kills", "50", "--ranks", ranks]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)
    tried(f"kills of training, {ranks} rank(s)", 50)


@full_only
@pytest.mark.parametrize("workers", ["1", "2"])
def test_preprocess_killed_at_random_moments(workers: str, tried: Tried) -> None:
    given = ["--kills", "50", "--workers", workers, "--num_patients", "6000"]
    subprocess.run([sys.executable, "-m", "benchmarks.kill_preprocess", *given], cwd=ROOT, env=ENVIRONMENT, check=True)
    tried(f"kills of preprocess, {workers} process(es)", 50)


def test_a_little_training_killed(tried: Tried) -> None:
    command = Command(kill_training.main, "--kills", 4, "--ranks", 2, "--patients", 12)
    _, said = command.communicate(timeout=300)
    assert command.returncode == 0, said
    tried("kills of training, 2 rank(s)", 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_preprocess_with_a_line_and_it_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    given = [*PREPARE[:2], 1500, *PREPARE[3:], "--output", tmp_path / "out"]
    command = Command(preprocess.main, *given)
    journal = tmp_path / "out" / ".preprocess" / "journal"
    while not list(journal.glob("*/*.json")):
        assert command.poll() is None
        time.sleep(0.005)
    command.send_signal(number)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 128 + number
    assert said.splitlines()[-1] == "preprocess.py: interrupted; the same command goes on from here"
    again = Command(preprocess.main, *given)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "it goes on where it was" in said


def test_data_are_on_the_disk_before_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls: write, fsync of the file, rename, fsync of the folder."""
    from pipeline.storage.files import write_atomically

    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"rename {b}"), real_replace(a, b))[1])
    write_atomically(tmp_path / "x", b"1")
    temporary, rename, folder = calls
    assert temporary.endswith(".tmp")
    assert Path(temporary).parent == tmp_path
    assert (rename, folder) == (f"rename {tmp_path / 'x'}", str(tmp_path))
