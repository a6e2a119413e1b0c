from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import machine
from pipeline.machine import peak_rss_bytes, release_free_memory, usable_cores


def cgroup(root: Path, folder: str, **files: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / folder / name.replace("_", ".", 1)).write_text(content + "\n")


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("membership", "cgroups", "expected"),
    [
        ("0::/", {}, 16),
        ("0::/", {"": {"cpu_max": "max 100000"}}, 16),
        ("0::/", {"": {"cpu_max": "350000 100000"}}, 3),
        ("0::/", {"": {"cpu_max": "20000 100000"}}, 1),
        ("0::/", {"": {"cpu_max": "9900000 100000"}}, 16),
        ("0::/job/step", {"job": {"cpu_max": "400000 100000"}, "job/step": {"cpu_max": "max 100000"}}, 4),
        ("0::/job/step", {"job": {"cpu_max": "400000 100000"}, "job/step": {"cpu_max": "100000 50000"}}, 2),
        ("0::/not/here", {"": {"cpu_max": "500000 100000"}}, 5),
        ("0::/../other", {"": {"cpu_max": "500000 100000"}}, 5),
        ("4:memory:/a\n3:cpu,x:/a\n0::/", {"cpu/a": {"cpu_cfs_quota_us": "250", "cpu_cfs_period_us": "100"}}, 2),
        ("3:cpu,cpuacct:/docker/x", {"cpu": {"cpu_cfs_quota_us": "600000", "cpu_cfs_period_us": "100000"}}, 6),
        ("3:cpu:/", {"cpu": {"cpu_cfs_quota_us": "-1", "cpu_cfs_period_us": "100000"}}, 16),
        ("3:cpuset:/", {"": {"cpu_cfs_quota_us": "100000", "cpu_cfs_period_us": "100000"}}, 16),
    ],
)  # fmt: skip
def test_usable_cores_are_the_minimum_of_affinity_and_quotas(
    membership: str, cgroups: dict[str, dict[str, str]], expected: int, tmp_path: Path
) -> None:
    for folder, files in cgroups.items():
        cgroup(tmp_path / "cgroup", folder, **files)
    (tmp_path / "membership").write_text(membership + "\n")
    assert usable_cores(tmp_path / "cgroup", tmp_path / "membership") == expected


def test_affinity_may_be_the_minimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup(tmp_path, "", cpu_max="800000 100000")
    (tmp_path / "membership").write_text("0::/\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores(tmp_path, tmp_path / "membership") == 2


def test_systems_without_affinity_and_cgroups_have_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    assert usable_cores(tmp_path, tmp_path / "none") == 10
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path, tmp_path / "none") == 1


def test_this_machine_has_a_core_and_memory() -> None:
    assert 1 <= usable_cores() <= 16
    release_free_memory()
    assert peak_rss_bytes() > 1 << 20


def test_memory_is_given_back_where_gaps_have_grown_above_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: memory after each step, and again after each time that it was given back."""
    looks = iter([300, 100, 150, 155, 165, 110, 170, 169, 184, 186, 105])
    monkeypatch.setattr(machine, "rss_bytes", lambda: next(looks))
    returned: list[int] = []
    monkeypatch.setattr(machine, "release_free_memory", lambda: returned.append(step))
    trimmer = machine.HeapTrimmer()
    for step in range(8):  # noqa: B007 # seen by the function above
        trimmer.end_step()
    # After the first step too.  A step adds 50, so 165 is too much; then one adds 60, so 184 is not and 186 is.
    assert returned == [0, 3, 7]
