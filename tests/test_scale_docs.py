"""The tables of docs/scale.md are what the committed measurements say; and the arithmetic behind them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.scale_costs import (
    LIMITS,
    SCENARIOS,
    Limit,
    Scenario,
    duration,
    filled,
    number,
    read_constants,
    serial,
    shared,
    size,
    tables,
    wall,
)

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_script_computes() -> None:
    content = tables(read_constants())
    assert filled(PAGE, content) == PAGE, "run python -m benchmarks.scale_costs --write docs/scale.md"
    assert all(table in PAGE for table in content.values())


def test_tables_are_put_in_their_places() -> None:
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    assert (
        filled(page, {"one": "1", "two": "2"}) == "a\n<!-- one -->\n1\n<!-- end -->\nb\n<!-- two -->\n2\n<!-- end -->\n"
    )


def test_a_limit_is_reached_where_it_is() -> None:
    kind = Scenario(name="", events=1000, patients=10, variables=5)
    assert kind.scaled(5000).patients == 50
    limit = Limit(what="", most=7e6, show=number, of=lambda it, c: it.patients * c["x"])
    assert limit.reached_at(kind, {"x": 2.0}) == pytest.approx(3.5e8, rel=2e-3)
    assert limit.reached_at(kind, {"x": 0.0}) == math.inf


def test_limits_grow_with_the_data() -> None:
    constants = read_constants()
    for limit in LIMITS:
        small, large = (limit.of(SCENARIOS[-1].scaled(events), constants) for events in (1e9, 1e12))
        assert small <= large, limit.what


def test_wall_time() -> None:
    constants = read_constants() | {"scheduler_seconds_per_task": 0.0}
    it = SCENARIOS[0].scaled(8 * 2**21)  # eight partitions
    work, alone = shared(it, constants), serial(it, constants)
    for workers, seconds in ((1, work), (4, work / 4), (5, work / 4), (100, work / 8)):
        assert wall(it, constants, workers) == pytest.approx(alone + seconds)


def test_numbers_are_said_in_two_digits() -> None:
    assert [number(value) for value in (0, 7, 999, 2345, 433e6, 1e9, 3e17, math.inf)] == [
        "0", "7", "1 k", "2.3 k", "430 M", "1 B", "300 Q", "never",
    ]  # fmt: skip
    assert [size(value) for value in (12.3, 2**31, 7.9e14)] == ["12 B", "2.1 GB", "790 TB"]
    assert [duration(value) for value in (3.21, 200, 7200, 86400 * 3, 1e9)] == [
        "3.2 s", "3.3 min", "2 h", "3 days", "32 years",
    ]  # fmt: skip
