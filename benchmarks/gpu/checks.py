"""Run the tests marked ``gpu`` and note each outcome as it is known.

On a machine without a GPU the same tests run on the CPU, which rehearses them and says nothing about a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.results import PartOptions, Result

ROOT = Path(__file__).parents[2]
QUICK_TESTS = "float32_agrees and small-True or mixed and small-bf16 or never_waits and fp16-False"


class Recorder:
    """A pytest plugin that writes the outcome of each test into a result."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "gpu: runs on a GPU")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.result.update(running=nodeid)  # the test that hangs, where the part is cut off

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {
            "test": report.nodeid.removeprefix("tests/gpu/"),
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "measured": dict(report.user_properties),
        }
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["message"] = str(crash.message if crash else report.longrepr)[:600]
        self.result.append("tests", row)


def main() -> int:
    options = PartOptions.parse(__doc__)
    result = Result(options.output, "checks")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["GPU_TESTS_DEVICE"] = "cpu"
    result.update(device="cuda" if on_gpu else "cpu", tests=[])
    # Neither the project's settings nor its fixtures are read: they need packages that a bare machine lacks.
    arguments = ["tests/gpu", "-c", os.devnull, "--rootdir", str(ROOT), "--noconftest", "-p", "no:cacheprovider"]
    arguments += ["-m", "gpu", "-q", "--tb=short"]
    if options.quick:
        arguments += ["-k", QUICK_TESTS]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code = int(pytest.main(arguments, plugins=[Recorder(result)]))
    result.update(running=None)
    return 0 if code == pytest.ExitCode.TESTS_FAILED else code  # a test that fails is a result of this part


if __name__ == "__main__":
    raise SystemExit(main())
