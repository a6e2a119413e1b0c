from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.segments import Segments, number_values, permute_rows, sum_rows, take_rows, take_unique


def test_segments_by_hand() -> None:
    segments = Segments.build(torch.tensor([2, 0, 2, 3]))
    assert segments.offsets.tolist() == [0, 1, 1, 3, 4]
    assert segments.order is not None
    assert segments.order.tolist() == [1, 0, 2, 3]
    assert segments.num_segments == 4


@given(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 1 << 40)), max_size=50))
def test_values_are_numbered_as_numpy_does(values: list[int]) -> None:
    found, number = number_values(torch.tensor(values, dtype=torch.int64))
    expected = np.unique(np.array(values, dtype=np.int64), return_inverse=True)
    assert found.tolist() == expected[0].tolist()
    assert number.tolist() == expected[1].tolist()


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=50))
def test_segments_of_any_rows(rows: list[int]) -> None:
    segments = Segments.build(torch.tensor(rows))
    assert segments.order is not None
    for number in set(rows):
        found = segments.order[segments.offsets[number] : segments.offsets[number + 1]]
        assert found.tolist() == [row for row, of in enumerate(rows) if of == number]


def test_gradients_of_rows_are_autograds() -> None:
    """Against plain indexing, row by row."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows, order = torch.tensor([2, 0, 2, 3, 3]), torch.tensor([1, 3, 0, 2])
    segments = Segments.build(rows)
    for found, expected in (
        (take_rows(x, segments), x[rows]),
        (permute_rows(x, order, order.argsort()), x[order]),
        (take_unique(x, order[:3]), x[order[:3]]),
        (sum_rows(x, Segments.build(torch.tensor([1, 0, 1, 2]))), torch.stack([x[1], x[0] + x[2], x[3]])),
    ):
        assert torch.equal(found, expected)
        grad = torch.randn(found.shape, dtype=torch.float64)
        assert torch.equal(*(torch.autograd.grad(of, x, grad, retain_graph=True)[0] for of in (found, expected)))
