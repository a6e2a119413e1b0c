from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.segments import (
    SegmentPrefixes,
    Segments,
    attention_pool,
    number_values,
    permute_rows,
    pool_prefixes,
    sum_rows,
    take_rows,
    take_unique,
)


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


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    prefixes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=9),
    reach=st.sampled_from([1.0, 80.0]),
    is_shuffled=st.booleans(),
)
def test_prefixes_are_pooled_as_segments_of_their_own(
    sizes: list[int], prefixes: list[tuple[int, int]], reach: float, is_shuffled: bool
) -> None:
    """Also where a late score is so much higher than an early one that float32 could not hold both weights."""
    offsets = np.cumsum([0, *sizes])
    prefixes = [(of % len(sizes), 1 + (number - 1) % sizes[of % len(sizes)]) for of, number in prefixes]
    starts = [int(offsets[of]) for of, _ in prefixes]
    torch.manual_seed(len(prefixes))
    place_of_row = torch.randperm(offsets[-1]) if is_shuffled else torch.arange(offsets[-1])
    rank = torch.cat([torch.arange(size) for size in sizes])
    ends = Segments.build(
        torch.tensor([s + n - 1 for s, (_, n) in zip(starts, prefixes, strict=True)], dtype=torch.int64)
    )
    given_ = SegmentPrefixes(place_of_row.argsort() if is_shuffled else None, rank, max(sizes), ends)
    values = torch.randn(offsets[-1], 4, requires_grad=True)
    scores = (reach * torch.randn(offsets[-1], 2)).requires_grad_()
    rows = [
        (place_of_row.argsort() if is_shuffled else place_of_row)[s : s + n]
        for s, (_, n) in zip(starts, prefixes, strict=True)
    ]
    pooled = pool_prefixes(values, scores, given_)
    row = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])
    of_row = torch.repeat_interleave(
        torch.arange(len(rows)), torch.tensor([len(each) for each in rows], dtype=torch.int64)
    )
    expected = attention_pool(values[row], scores[row], Segments.build(of_row, len(rows)))
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)
    if prefixes:
        grad = torch.randn(pooled.shape)
        for ours, theirs in zip(
            *(torch.autograd.grad(of, (values, scores), grad) for of in (pooled, expected)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
