"""The fault suite: a fast part with every test run, a full one with ``make test-faults``, which keeps its counts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

FULL = os.environ.get("FAULTS") == "full"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"

_tried: dict[str, int] = {}
_failed: list[str] = []


def cases(fast: int, full: int) -> int:
    """How many to try."""
    return full if FULL else fast


full_only = pytest.mark.skipif(not FULL, reason="with make test-faults")


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Notes how many cases a promise was tried with."""
    return record_property


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/faults" in report.nodeid.replace(os.sep, "/"):
        if report.when == "call":
            for promise, number in report.user_properties:
                _tried[promise] = _tried.get(promise, 0) + int(str(number))
        if report.failed:
            _failed.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if FULL and not hasattr(session.config, "workerinput") and _tried:
        from benchmarks.machine import describe

        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        tried = {**earlier.get("tried", {}), **_tried}
        content = {"machine": describe(), "tried": dict(sorted(tried.items())), "failed": _failed}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
