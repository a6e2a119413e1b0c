from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.arrays import choose_evenly, concatenate_ranges, find_runs, harden, offsets_from_sizes


def test_offsets_begin_with_zero_and_end_with_the_sum() -> None:
    assert offsets_from_sizes(np.array([2, 0, 3], dtype=np.int32)).tolist() == [0, 2, 2, 5]
    assert offsets_from_sizes(np.array([], dtype=np.int64)).tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=20))
def test_ranges_are_the_concatenation_of_each_range(parts: list[tuple[int, int]]) -> None:
    expected = [number for start, size in parts for number in range(start, start + size)]
    starts, sizes = np.array(parts, dtype=np.int64).reshape(-1, 2).T
    assert concatenate_ranges(starts, sizes).tolist() == expected


@given(st.lists(st.integers(0, 2), max_size=20))
def test_runs_begin_where_a_value_differs_from_the_one_before(values: list[int]) -> None:
    expected = [at for at in range(len(values)) if at == 0 or values[at] != values[at - 1]]
    assert find_runs(np.array(values, np.int64)).tolist() == expected


def test_soft_labels_are_classes_from_one_half_on() -> None:
    np.testing.assert_array_equal(harden(np.array([0.0, 0.49, 0.5, 1.0, np.nan])), [0, 0, 1, 1, np.nan])
    np.testing.assert_array_equal(harden(np.array([-1, 0, 1])), [-1, 0, 1])


def test_positions_are_chosen_evenly() -> None:
    assert choose_evenly(9, 3).tolist() == [0, 4, 8]
    assert choose_evenly(3, 9).tolist() == [0, 1, 2]
    assert choose_evenly(1, 5).tolist() == [0]
    assert choose_evenly(0, 5).tolist() == []
