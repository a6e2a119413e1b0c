from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import machine
from pipeline.machine import peak_rss_bytes, release_free_memory, usable_cores, usable_memory


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


GIB = 1 << 30
V1, V2 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")


def memory_files(version: tuple[str, str, str], limit: str, usage: int, cached: int = 0) -> dict[str, str]:
    names = (f"memory_{version[0]}", f"memory_{version[1]}", "memory_stat")
    return dict(zip(names, (limit, str(usage), f"anon 7\n{version[2]} {cached}\nactive_file 9"), strict=True))


@pytest.mark.parametrize(
    ("membership", "cgroups", "expected"),
    [
        ("0::/", {}, 8 * GIB),
        ("0::/", {"": memory_files(V2, "max", 5)}, 8 * GIB),
        ("0::/", {"": memory_files(V2, str(3 * GIB), GIB)}, 2 * GIB),
        ("0::/", {"": memory_files(V2, str(3 * GIB), GIB, 100)}, 2 * GIB + 100),
        ("0::/", {"": memory_files(V2, str(90 * GIB), GIB)}, 8 * GIB),
        ("0::/", {"": memory_files(V2, str(GIB), 2 * GIB)}, 0),
        ("0::/a/b", {"a": memory_files(V2, "4000", 500), "a/b": memory_files(V2, "max", 400)}, 3500),
        ("0::/a/b", {"a": memory_files(V2, "4000", 500), "a/b": memory_files(V2, "2000", 400)}, 1600),
        ("0::/not/here", {"": memory_files(V2, "4000", 500)}, 3500),
        ("4:memory:/a\n3:cpu:/b\n0::/", {"memory/a": memory_files(V1, "900", 300, 50)}, 650),
        ("4:memory:/a", {"memory": memory_files(V1, str((1 << 63) - 4096), 300)}, 8 * GIB),
        ("3:cpu:/a", {"memory/a": memory_files(V1, "900", 300)}, 8 * GIB),
    ],
)
def test_usable_memory_is_the_minimum_of_the_machine_and_its_cgroups(
    membership: str, cgroups: dict[str, dict[str, str]], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    for folder, files in cgroups.items():
        cgroup(tmp_path / "cgroup", folder, **files)
    (tmp_path / "membership").write_text(membership + "\n")
    assert usable_memory(tmp_path / "cgroup", tmp_path / "membership") == expected


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
    assert usable_memory() > 1 << 20
    release_free_memory()
    assert peak_rss_bytes() > 1 << 20


def test_memory_is_given_back_before_a_step_that_would_raise_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: memory before each step, after it, and in between where it was given back."""
    steps = [
        (10, [300]),  # the first one makes what lasts
        (10, [300, 100, 150]),  # it adds 50, or 5 an event
        (5, [150, 152]),  # gaps of 50 and 25 are less than 80
        (9, [152, 100, 140]),  # gaps of 52 and 45 are more; it adds 40
        (12, [140, 101, 161]),  # 40 and 60; it adds 60
        (8, [150, 150]),  # 49 and 40 are less than 96
    ]
    looks: list[int] = []
    monkeypatch.setattr(machine, "rss_bytes", lambda: looks.pop(0))
    returned: list[int] = []
    monkeypatch.setattr(machine, "release_free_memory", lambda: returned.append(number))
    trimmer = machine.HeapTrimmer()
    for number, (num_events, memory) in enumerate(steps):  # noqa: B007 # seen by the function above
        looks[:] = memory
        trimmer.begin_step(num_events)
        trimmer.end_step(num_events)
        assert not looks
    assert returned == [1, 3, 4]


@pytest.mark.parametrize(("spare", "returned"), [(0, [1, 3]), (11, [1, 3]), (12, [1]), (99, [1])])
def test_gaps_may_take_spare_memory(spare: int, returned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As above: gaps of 52, and 45 that the last step adds, are 12 more than the 1.7 times 50 that a step may take."""
    looks = [300, 300, 100, 150, 150, 152, 152, 100, 140, 140]
    monkeypatch.setattr(machine, "MAX_HELD", 1.7)
    monkeypatch.setattr(machine, "rss_bytes", lambda: looks.pop(0))
    found: list[int] = []
    monkeypatch.setattr(machine, "release_free_memory", lambda: found.append(number))
    trimmer = machine.HeapTrimmer(spare=spare)
    for number, num_events in enumerate((10, 10, 5, 9)):  # noqa: B007 # seen by the function above
        trimmer.begin_step(num_events)
        trimmer.end_step(num_events)
    assert found == returned


def test_memory_is_given_back_before_a_step_that_would_exceed_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [200, 200, 100, 150, 150, 152, 152, 100, 140, 100, 160]
    monkeypatch.setattr(machine, "rss_bytes", lambda: looks.pop(0))
    returned: list[int] = []
    monkeypatch.setattr(machine, "release_free_memory", lambda: returned.append(number))
    trimmer = machine.HeapTrimmer(limit=170)
    # A step adds 50, or 5 an event; 150 and 10 are within the limit, 152 and 25 are not, and 100 and 75 have no gaps.
    for number, num_events in enumerate((10, 10, 2, 5, 15)):  # noqa: B007 # seen by the function above
        trimmer.begin_step(num_events)
        trimmer.end_step(num_events)
    assert returned == [1, 3]
    assert not looks
