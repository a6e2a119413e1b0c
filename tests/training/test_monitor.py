from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.loading.batch import PatientBatch
from pipeline.schema import UserError
from training.json_lines import JsonLines
from training.metrics import BatchAmounts, Throughput
from training.monitor import MEMORY_COLUMNS, MemoryMonitor
from training.parallel import World

MEBIBYTE = 1 << 20
HOLD = f"import sys; held = b'x' * (64 * {MEBIBYTE}); print('held', flush=True); sys.stdin.read()"


def read_samples(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a thread; the bound only ends a test that hangs."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("never came true")


def test_memory_of_children_is_sampled(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    with MemoryMonitor(path, interval_seconds=0.02) as monitor:
        command = [sys.executable, "-c", HOLD]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            monitor.mark("child holds 64 MiB")
            wait_until(lambda: any(row["event"].startswith("child") for row in read_samples(path)))
            child.communicate()
        num_samples = len(read_samples(path))
        wait_until(lambda: len(read_samples(path)) > num_samples)  # it goes on when a child has died

    samples = read_samples(path)
    assert tuple(samples[0]) == MEMORY_COLUMNS
    assert {row["role"] for row in samples if row["pid"] == str(os.getpid())} == {"main"}
    of_child = [int(row["rss_bytes"]) for row in samples if row["pid"] == str(child.pid)]
    assert max(of_child) > 64 * MEBIBYTE
    assert {row["role"] for row in samples if row["pid"] == str(child.pid)} == {"child"}
    assert [row["event"] for row in samples if row["event"]] == ["start", "child holds 64 MiB"]
    assert all(row["cuda_allocated_bytes"] == "" for row in samples if row["role"] == "child")

    # The process that runs the tests may have other children, of earlier tests: the peak is over moments, of all.
    moments = Counter[str]()
    for row in samples:
        moments[row["seconds"]] += int(row["rss_bytes"])
    assert monitor.peak_rss_bytes == max(moments.values())
    main_rss = max(int(row["rss_bytes"]) for row in samples if row["role"] == "main")
    assert monitor.peak_rss_bytes > main_rss
    assert monitor.peak_uss_bytes is None or monitor.peak_uss_bytes > 64 * MEBIBYTE


def test_processes_that_hide_or_vanish_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Vanished(psutil.Process):
        def memory_info(self) -> None:
            raise psutil.NoSuchProcess(self.pid)

    class Hidden(psutil.Process):
        def memory_full_info(self) -> None:
            raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [Vanished(), Hidden()])
    with MemoryMonitor(tmp_path / "memory.csv", interval_seconds=0.01) as monitor:
        pass
    samples = read_samples(tmp_path / "memory.csv")
    assert len(samples) == 2 * len({row["seconds"] for row in samples})
    assert {row["uss_bytes"] == "" for row in samples if row["role"] == "child"} == {True}
    assert monitor.peak_uss_bytes is None  # a sum without a process would be too low
    assert monitor.peak_rss_bytes > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_ends_the_samples_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(MemoryMonitor, "_sample", fail)
    with MemoryMonitor(tmp_path / "memory.csv") as monitor:
        monitor.mark("goes on")
    assert read_samples(tmp_path / "memory.csv") == []


def test_no_directory_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), MemoryMonitor(tmp_path / "none" / "memory.csv"):
        pass


@pytest.mark.parametrize("holder", ["itself", "a child that has ended"])
def test_peak_counts_memory_that_is_gone(holder: str) -> None:
    hold = f"held = b'x' * (256 * {MEBIBYTE}); del held"
    in_child = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {hold!r}])"
    statement = hold if holder == "itself" else in_child
    code = f"from pipeline.machine import peak_rss_bytes; {statement}; print(peak_rss_bytes())"
    grown = b"x" * (512 * MEBIBYTE)  # of the process that starts it: none of its business
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 256 * MEBIBYTE < int(run.stdout) < len(grown)


def test_lines_are_there_as_soon_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write({"kind": "train", "step": 1, "loss": float("nan"), "note": "ü\n"})
        assert json.loads(path.read_text()) == {"kind": "train", "step": 1, "loss": None, "note": "ü\n"}
    with JsonLines(path) as lines:
        lines.write({"kind": "train", "step": 2, "loss": float("inf")})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_resuming_drops_the_cut_line_and_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1}\n{"kind": "event"}\n{"step": 2}\n'
    path.write_text(kept + '{"step": 3}\n{"step": 4, "lo')
    with JsonLines(path, keep=3) as lines:
        lines.write({"step": 3})
        assert lines.num_lines == 4
    assert path.read_text() == kept + '{"step": 3}\n'

    path.write_text(kept + '{"st')
    JsonLines(path).close()
    assert path.read_text() == kept


@pytest.mark.parametrize("bad", ["half a li", "[1]", "7"])
def test_a_file_that_is_not_ours_is_refused_and_kept(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        JsonLines(path)
    assert path.read_text() == f'{{"step": 1}}\n{bad}\n'


def batch_of(*patients: list[int]) -> PatientBatch:
    """Patients given by the sizes of their sets."""
    set_sizes = torch.tensor([size for patient in patients for size in patient], dtype=torch.int64)
    num_sets = torch.tensor([len(patient) for patient in patients], dtype=torch.int64)
    num_events, zero = int(set_sizes.sum()), torch.zeros(1, dtype=torch.int64)
    return PatientBatch(
        code=torch.full((num_events,), 2),
        value=torch.zeros(num_events),
        has_value=torch.ones(num_events, dtype=torch.bool),
        set_offsets=torch.cat([zero, set_sizes.cumsum(0)]),
        minute=torch.zeros(len(set_sizes)),
        patient_offsets=torch.cat([zero, num_sets.cumsum(0)]),
        label=torch.zeros(len(patients), dtype=torch.int64),
        patient_id=[str(number) for number in range(len(patients))],
    )


def test_throughput_by_hand() -> None:
    throughput = Throughput()
    throughput.add(BatchAmounts.of(batch_of([4], [2])), seconds=3.0, waited=1.0)
    throughput.add(BatchAmounts.of(batch_of([5, 3, 2])), seconds=1.0, waited=0.0)
    expected = {
        "patients_per_second": 3 / 4,
        "events_per_second": 16 / 4,
        "data_wait_fraction": 1 / 4,
        "event_padding_waste": (8 + 10 - 16) / 18,
        "set_padding_waste": 0.0,
    }
    assert throughput.rates() == expected
    throughput = Throughput()
    throughput.add(BatchAmounts.of(batch_of([2, 1, 1], [2]), pad_to=10), seconds=1.0, waited=0.0)
    assert throughput.rates()["event_padding_waste"] == 14 / 20
    throughput = Throughput()
    throughput.add(BatchAmounts.of(batch_of([2, 1, 1], [2])), seconds=1.0, waited=0.0)
    assert throughput.rates()["set_padding_waste"] == 2 / 6


def test_throughput_of_all_ranks_counts_once_however_often_it_is_combined() -> None:
    first, second = Throughput(), Throughput()
    first.add(BatchAmounts.of(batch_of([4], [2])), seconds=3.0, waited=1.0)
    second.add(BatchAmounts.of(batch_of([5])), seconds=3.0, waited=0.0)
    ranks = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    together = Throughput.combine([first, second])
    assert (together.num_steps, together.num_patients, together.num_events) == (1, 3, 11)
    assert (together.seconds, together.waited) == (3.0, 0.5)
    assert Throughput.combine([together.share(world) for world in ranks]) == together
    assert Throughput().rates()["patients_per_second"] == 0
