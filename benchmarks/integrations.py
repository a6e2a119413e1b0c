"""Run the tests of other libraries and note with which versions: ``python -m benchmarks.integrations``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from benchmarks.machine import describe, publish

TESTS = Path(__file__).parents[1] / "tests" / "integrations"
LIBRARIES = ("accelerate", "lightning", "meds-evaluation", "mlflow", "tensorboard", "torchdata", "wandb")


class Outcomes:
    """A plugin of pytest that notes how each test ends, and the reason where one is skipped."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome
        self._note_skip(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note_skip(report)

    def _note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.skipped.append(str(report.longrepr[2]))


def find_versions() -> dict[str, str]:
    """Return the version of each library that is installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    outcomes = Outcomes()
    code = pytest.main(["--quiet", str(TESTS)], plugins=[outcomes])
    counts, files = Counter(outcomes.tests.values()), Counter[str]()
    for test, outcome in outcomes.tests.items():
        files[Path(test.partition("::")[0]).name] += outcome == "passed"
    machine = {"machine": describe(), "versions": find_versions()}
    publish(
        {**machine, **counts, "skips": outcomes.skipped, "passed_by_file": dict(sorted(files.items()))}, options.output
    )
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
