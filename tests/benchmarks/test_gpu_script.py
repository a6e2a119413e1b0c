"""``benchmarks/gpu.sh`` on a CPU: every part reports, whatever happens to the others."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.launches import busy_microseconds, summarise
from benchmarks.gpu.results import PartOptions, Result, close
from benchmarks.gpu.table import MAX_LINES, PARTS, read_results, tabulate
from benchmarks.steps import PRECISIONS

ROOT = Path(__file__).parents[2]
MISSING = ("polars", "webdataset", "fsspec", "s3fs", "duckdb", "distributed")
"""Packages that a bare machine lacks."""


def run_script(output: Path, **environment: str) -> str:
    """Run the script without a GPU in sight and return what it printed."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_", "LIMIT_", "PYTEST_"))}
    given |= {"GPU_SH_QUICK": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", "benchmarks/gpu.sh", str(output)]
    return subprocess.run(command, cwd=ROOT, env=given, check=True, capture_output=True, text=True).stdout


def fake_python(tmp_path: Path, **parts: str) -> str:
    """Write an interpreter that runs the given Python text in place of a part, and everything else as it is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    cases = []
    for part, text in parts.items():
        (folder / f"{part}.py").write_text(textwrap.dedent(text))
        cases.append(f'"-m benchmarks.gpu.{part}") shift 2; exec {sys.executable} {folder}/{part}.py "$@" ;;')
    path = folder / "python"
    path.write_text("\n".join(["#!/bin/sh", 'case "$1 $2" in', *cases, "esac", f'exec {sys.executable} "$@"', ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


REPORTS = """
    import sys
    sys.path.insert(0, ".")
    from pathlib import Path
    from benchmarks.gpu.results import Result
    result = Result(Path(sys.argv[1]), "{part}")
    result.append("rows", {row})
"""


def test_every_part_reports_on_a_machine_without_a_gpu_and_without_polars(tmp_path: Path) -> None:
    blocker = tmp_path / "site"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(textwrap.dedent(f"""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {MISSING!r}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocker())
    """))  # fmt: skip
    output = tmp_path / "results"
    patience = {f"LIMIT_{part}": "900" for part in PARTS} | {"DEADLINE": "6000"}  # whatever else this machine does
    printed = run_script(output, PYTHON=sys.executable, PYTHONPATH=str(blocker), **patience)
    assert sorted(path.name for path in output.iterdir()) == sorted([*(f"{part}.json" for part in PARTS), "table.txt"])
    results = {part: json.loads((output / f"{part}.json").read_text()) for part in PARTS}
    for part, content in results.items():
        assert content["state"] == "done", (part, content)
        assert content["device"] == "cpu"
        versions = {"card", "driver", "date", "python", "torch", "triton", "cuda", "commit"}
        assert versions <= set(content)
    assert {test["outcome"] for test in results["checks"]["tests"]} == {"passed"}
    assert any("never_waits" in test["test"] for test in results["checks"]["tests"])
    speed = [row for row in results["speed"]["rows"] if "note" not in row]
    assert {(row["preset"], row["precision"]) for row in speed} == {
        (preset, precision) for preset in ("small", "reference") for precision in PRECISIONS
    }
    assert all(row["patients_per_second"] > 0 and row["peak_cuda_bytes"] is None for row in speed)
    assert all(row["launches"] is None and row["host_operations"] > 1000 for row in results["launches"]["rows"])
    assert [row["prefetch"] for row in results["prefetch"]["rows"]] == [0]
    assert all(row["patients_per_second"] > 0 for row in results["prefetch"]["rows"])
    assert results["training"]["exit_code"] == 0
    assert results["training"]["summary"]["steps"] > 0
    assert all(row["times_the_loop"] > 0 for row in results["loop"]["rows"])
    table = (output / "table.txt").read_text().splitlines()
    assert len(table) <= MAX_LINES
    assert printed.endswith("\n".join(table) + "\n")
    assert "not measured" in "\n".join(table)
    assert not [line for line in table if "cannot be shown" in line]


def test_a_part_that_hangs_is_cut_off_and_one_that_crashes_is_shown(tmp_path: Path) -> None:
    row = {"preset": "small", "precision": "fp32", "batch_size": 1, "steps_per_second": 2.0,
           "patients_per_second": 2.0, "peak_cuda_bytes": None}  # fmt: skip
    python = fake_python(
        tmp_path,
        data="pass",
        speed=REPORTS.format(part="speed", row=row)
        + """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only killing ends it
    time.sleep(600)
""",
        launches="raise RuntimeError('no such kernel')",
        loop=REPORTS.format(part="loop", row={}),
    )
    output = tmp_path / "results"
    parts = "speed launches loop"
    printed = run_script(output, PYTHON=python, PARTS=parts, LIMIT_speed="6", DATA="")
    results = read_results(output)
    assert results["speed"]["state"].startswith("cut off after")
    assert results["speed"]["rows"] == [row]
    assert results["launches"]["state"] == "failed (exit code 1)"
    assert results["loop"]["state"] == "done"
    assert results["checks"]["state"] == "did not run"
    assert "small          1      2.00" in printed
    assert "no such kernel" in printed


def test_no_part_runs_after_the_deadline(tmp_path: Path) -> None:
    hangs = "import time\ntime.sleep(600)"
    python = fake_python(tmp_path, **dict.fromkeys(PARTS, hangs))
    printed = run_script(tmp_path / "results", PYTHON=python, DATA=str(tmp_path), DEADLINE="9")
    results = read_results(tmp_path / "results")
    assert results["checks"]["state"].startswith("cut off after")
    assert results["loop"]["state"] == "did not run"
    assert "loop: left out, no time is left" in printed


def test_a_result_is_whole_at_every_moment_and_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    result = Result(path, "speed")
    assert json.loads(path.read_text())["state"] == "unfinished"
    result.append("rows", {"batch_size": 1})
    close(path, part="speed", exit_code=137, seconds=20.0, limit=20.0, log=None)
    content = json.loads(path.read_text())
    assert content["state"] == "cut off after 20 s"
    assert content["rows"] == [{"batch_size": 1}]
    close(path, part="speed", exit_code=137, seconds=3.0, limit=20.0, log=None)  # killed by something else
    assert json.loads(path.read_text())["state"] == "failed (exit code 137)"


def test_launches_are_counted_and_overlapping_kernels_once() -> None:
    def event(category: str, start: float, duration: float, name: str = "k") -> dict[str, Any]:
        return {"ph": "X", "cat": category, "ts": start, "dur": duration, "name": name}

    events = [
        event("cpu_op", 0, 50),
        event("kernel", 10, 20),
        event("kernel", 20, 20),
        event("gpu_memcpy", 60, 10, "copy"),
        event("cuda_runtime", 5, 1, "cudaStreamSynchronize"),
        {"ph": "M", "name": "process_name"},
    ]
    found = summarise(events, steps=2, step_seconds=40e-6)
    assert busy_microseconds([(10, 30), (20, 40), (60, 70)]) == 40
    assert found["launches"] == 1.5
    assert found["busy_milliseconds"] == pytest.approx(0.02)
    assert found["idle_share"] == pytest.approx(0.5)
    assert found["waits"] == {"cudaStreamSynchronize": 0.5}
    assert found["host_operations"] == 0.5
    assert found["kernels"][0] == {"name": "k", "launches": 1.0, "milliseconds": pytest.approx(0.02)}
    assert summarise(events[:1], 1, 1.0)["launches"] is None


def test_the_table_has_at_most_sixty_lines_whatever_fails() -> None:
    failed = [{"test": f"t{n}", "outcome": "failed", "message": "x " * 400} for n in range(99)]
    rows = [
        {"preset": preset, "precision": precision, "batch_size": size, "note": "out of memory"}
        for preset in ("a", "b", "c", "d", "e")
        for precision in PRECISIONS
        for size in range(20)
    ]
    results = {part: {"state": "failed (exit code 1)", "log": ["boom"]} for part in PARTS}
    results["checks"] |= {"tests": failed, "device": "cuda"}
    results["speed"] |= {"rows": rows}
    results["loop"] |= {"rows": [{"preset": "small"}]}
    lines = tabulate(results)
    assert len(lines) <= MAX_LINES
    assert any("more lines" in line for line in lines)
    assert "cannot be shown: KeyError: 'batch_size'" in "\n".join(tabulate({"loop": results["loop"]}))


def test_parts_refuse_a_command_line_without_data() -> None:
    with pytest.raises(SystemExit):
        PartOptions.parse(None, ["out.json"])
