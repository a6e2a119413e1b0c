from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.arrays import Floats
from pipeline.reports import lengths
from pipeline.reports.lengths import Lengths, find_medians

NUMBERS = st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False, width=32)
PARTS = st.lists(st.lists(st.integers(1, 40), max_size=9), max_size=9)


@given(PARTS)
def test_lengths_are_counted_as_one_array_is(parts: list[list[int]]) -> None:
    counted, values = Lengths(*(np.array(part, np.int32) for part in parts)), np.array([*chain(*parts)], np.int64)
    assert len(counted) == len(values)
    found, expected = counted.distinct, np.unique(values, return_counts=True)
    assert [column.tolist() for column in found] == [column.tolist() for column in expected]
    if len(values):
        assert counted.median == np.median(values)


@given(
    parts=st.lists(st.tuples(st.sampled_from("ab"), st.lists(NUMBERS, max_size=9)), max_size=12),
    max_held=st.sampled_from([0, 1, 5, 1 << 20]),
)
def test_medians_are_those_of_numpy_however_few_numbers_are_held(
    parts: list[tuple[str, list[float]]], max_held: int
) -> None:
    with patch.object(lengths, "MAX_HELD", max_held):
        found = find_medians(lambda: ((name, np.array(part, np.float64)) for name, part in parts))
    together = {wanted: [*chain(*(part for name, part in parts if name == wanted))] for wanted in "ab"}
    assert found == {name: np.median(each) for name, each in together.items() if each}


def test_more_numbers_than_are_held_are_read_once_a_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "MAX_HELD", 10)
    times = 0

    def read() -> Iterator[tuple[str, Floats]]:
        nonlocal times
        times += 1
        yield "few", np.arange(3.0)
        yield "many", np.arange(5.0)
        yield "many", np.arange(6.0) - 0.5

    assert find_medians(read) == {"few": 1.0, "many": 2.0}
    assert times == 5
