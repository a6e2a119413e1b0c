from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import preprocess
from pipeline.dataset.manifest import ShardEntry
from pipeline.prepare.build import build
from pipeline.prepare.executors import InlineExecutor
from pipeline.prepare.journal import JOURNAL, Stage, StageRunner, ignore_progress
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.publish import WORK
from pipeline.prepare.rules import Rules
from pipeline.prepare.sort import SortedPartition
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.write import WrittenPartition
from tests.pipeline.prepare.test_build import shard_bytes
from tests.pipeline.prepare.test_executors import PATIENTS, prepare
from tests.processes import Command


@dataclass
class Counted:
    number: int


def count(number: int, calls: list[int]) -> Counted:
    if number in calls:
        raise ZeroDivisionError
    calls.append(number)
    return Counted(number)


COUNT = Stage(name="count", task=count, result=Counted, size=lambda result: result.number)


def run(work: Path, numbers: list[int], calls: list[int]) -> list[Counted]:
    return StageRunner(InlineExecutor(), work, ignore_progress).run(COUNT, [(number, calls) for number in numbers])


def test_what_is_in_the_journal_is_not_done_again(tmp_path: Path) -> None:
    calls = [2]
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, [0, 1, 2, 3], calls)
    assert calls == [2, 0, 1]
    assert sorted(path.name for path in (tmp_path / JOURNAL / "count").iterdir()) == ["000000.json", "000001.json"]
    calls = []
    assert run(tmp_path, [0, 1, 2, 3], calls) == [Counted(number) for number in range(4)]
    assert calls == [2, 3]


def test_progress_counts_what_an_earlier_run_has_done(tmp_path: Path) -> None:
    run(tmp_path, [5, 6], [])
    seen: list[tuple[str, int, int, int]] = []

    def progress(stage: str, *, done: int, total: int, rows: int) -> None:
        seen.append((stage, done, total, rows))

    StageRunner(InlineExecutor(), tmp_path, progress).run(COUNT, [(number, []) for number in (5, 6, 7)])
    assert seen == [("count", 2, 3, 11), ("count", 3, 3, 18)]


def test_results_come_back_from_the_journal(tmp_path: Path) -> None:
    plain: dict[str, Any] = dict.fromkeys(SortedPartition.__slots__, 3)
    sorted_ = SortedPartition(**(plain | {"without_events": ["p", "ü\n"], "rejects": {"duplicate": 1}}))
    entry = ShardEntry(path="train/0.tar", num_patients=1, num_sets=2, num_events=3, num_bytes=4, sha256="5")
    written = WrittenPartition(shards={"train": [entry]}, num_events=3)
    for found in (sorted_, written):
        stage = Stage(name=type(found).__name__, task=lambda: found, result=type(found), size=lambda _: 0)  # noqa: B023
        for _ in range(2):
            (back,) = StageRunner(InlineExecutor(), tmp_path, ignore_progress).run(stage, [()])
        assert back is not found
        assert back == found


def test_killed_again_and_again_the_output_is_that_of_a_run_left_alone(tmp_path: Path) -> None:
    """Each kill comes after some more tasks are done, so that every stage is met."""

    def start(output: Path) -> Command:
        return Command(prepare, *PATIENTS, "--output", output, "--workers", 2)

    with patch("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 25}):
        assert preprocess.main([*PATIENTS, "--output", str(tmp_path / "whole"), "--workers", "1"]) == 0
    tasks = 24 + 2 * math.ceil(600 * 425 / 20_000)
    rng = random.Random(0)
    output = tmp_path / "killed"
    for goal in sorted(rng.sample(range(1, tasks - 2), 4)):
        running = start(output)
        while len(list((output / WORK / JOURNAL).glob("*/*.json"))) < goal and running.poll() is None:
            time.sleep(0.002)
        running.kill()
        running.communicate(timeout=10)
    running = start(output)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert "it goes on where it was" in said or "nothing to do" in said
    assert shard_bytes(output) == shard_bytes(tmp_path / "whole")
    assert not (output / WORK).exists()


@pytest.mark.parametrize("outlier_std", [None, 6.0])
@pytest.mark.parametrize(
    ("stopped_in", "lost"),
    [
        ("stages.write_partition", "sorted/00001.arrow"),
        ("stages.write_partition", "journal/read/000001.json"),
        ("stages.write_partition", "journal/measure/000000.json"),
        ("stages.write_partition", "journal/sort/000001.json"),
        ("summary.Results.join_tables", "index/*-00001.arrow"),
        ("summary.Results.join_tables", "data/train/00001.parquet"),
        ("summary.Results.join_tables", "journal/sort/000000.json"),
        ("summary.Results.join_tables", "journal/write/000001.json"),
    ],
)
def test_what_was_used_up_is_made_again_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str, lost: str, outlier_std: float | None
) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 20})
    source = Synthetic(num_patients=50)
    options = BuildOptions(events_per_shard=5000, rules=Rules(outlier_std=outlier_std))
    build(source, tmp_path / "whole", options)

    def stop(*_: object, **__: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(f"pipeline.prepare.{stopped_in}", stop)
        with pytest.raises(OSError, match="stopped"):
            build(source, tmp_path / "out", options)
    assert not (tmp_path / "out" / WORK / "spills").exists()
    paths = list((tmp_path / "out" / WORK).glob(lost))
    assert paths or (outlier_std is None and "measure" in lost)
    for path in paths:
        path.unlink()
    build(source, tmp_path / "out", options)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(3))
def test_a_task_is_done_again_where_power_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Any file of the work folder that nobody waited for, entries of the journal too, may have lost its end."""
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 20})
    source, options = Synthetic(num_patients=50), BuildOptions(events_per_shard=5000)
    build(source, tmp_path / "whole", options)
    synced: set[str] = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file))[1])
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prepare.summary.Results.join_tables", lambda *_: 1 // 0)
        patch.setattr("pipeline.prepare.publish._remove", lambda _: None)  # as when power is lost
        with pytest.raises(ZeroDivisionError):
            build(source, tmp_path / "out", options)
    synced = {f"{Path(name).parent}/{Path(name).name.split('.')[1]}" for name in synced if name.endswith(".tmp")}
    rng, work = random.Random(seed), tmp_path / "out" / WORK
    unsynced = [path for path in sorted(work.rglob("*.*")) if f"{path.parent}/{path.name.split('.')[0]}" not in synced]
    assert {path.parent.name for path in unsynced} >= {"read", "sort", "write", "index", "moments"}
    for path in rng.sample(unsynced, len(unsynced) // 2):
        os.truncate(path, rng.choice([0, path.stat().st_size // 2]))
    build(source, tmp_path / "out", options)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("folder", ["spills", "sorted"])
def test_a_folder_that_is_half_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 20})
    source, options = Synthetic(num_patients=50), BuildOptions(events_per_shard=5000)
    build(source, tmp_path / "whole", options)

    def remove(path: Path) -> None:
        files = sorted(path.iterdir())
        for file in files[: 1 if path.name == folder else len(files)]:
            file.unlink()
        if path.name == folder:
            raise OSError("stopped")
        path.rmdir()

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prepare.stages.shutil.rmtree", remove)
        with pytest.raises(OSError, match="stopped"):
            build(source, tmp_path / "out", options)
    assert any((tmp_path / "out" / WORK / folder).iterdir())
    build(source, tmp_path / "out", options)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
