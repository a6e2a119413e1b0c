"""Pooling and sums of segments, and the causal attention of a patient's sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.kernels import ops
from model.segments import Segments, attention_pool, take_rows
from model.sequence import SequenceLayout
from tests.model.kernels.helpers import by_set, check


@pytest.mark.parametrize(("heads", "width"), [(1, 64), (2, 24), (3, 5)])
@pytest.mark.parametrize("segment", [[2, 0, 1, 2, 2, 0] * 9, [0] * 40, [0], [0, 1, 2]])
def test_pooling(segment: list[int], heads: int, width: int) -> None:
    segments = Segments.build(torch.tensor(segment))
    values = torch.randn(len(segment), heads * width, requires_grad=True)
    scores = torch.randn(len(segment), heads, requires_grad=True)

    def reference() -> Tensor:
        rows = [torch.tensor(segment) == number for number in range(max(segment) + 1)]
        weights = [scores[row].softmax(0)[..., None] * values[row].view(-1, heads, width) for row in rows]
        return torch.stack([of_segment.sum(0).flatten() for of_segment in weights])

    check(lambda: attention_pool(values, scores, segments), reference, [values, scores])


def test_rows_that_are_left_out_of_a_pool_come_first() -> None:
    values, scores = torch.randn(20, 8), torch.zeros(20, 1)
    scores[:17] = -torch.inf
    found = attention_pool(values, scores, Segments(torch.zeros(20, dtype=torch.int64), torch.tensor([0, 20])))
    torch.testing.assert_close(found[0], values[17:].mean(0))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([(3,), (5, 40), (130,)]))
def test_taking_rows(segment: list[int], shape: tuple[int, ...]) -> None:
    x, of_row = torch.randn(8, *shape, requires_grad=True), torch.tensor(segment)
    check(lambda: take_rows(x, Segments.build(of_row)), lambda: x[of_row], [x])


@pytest.mark.parametrize("num_sets", [[1], [31, 32, 33], [2, 70, 1]])
@pytest.mark.parametrize(("heads", "width"), [(2, 32), (3, 5)])
def test_causal_attention(num_sets: list[int], heads: int, width: int) -> None:
    offsets = torch.tensor([0, *num_sets]).cumsum(0)
    layout = SequenceLayout.build(offsets)
    qkv = torch.randn(sum(num_sets), 3, heads, width, requires_grad=True)

    def reference() -> Tensor:
        parts = []
        for x in by_set(qkv, offsets):
            query, key, value = x.permute(1, 2, 0, 3)
            parts.append(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    check(lambda: ops.causal(qkv, layout.tile_patient, layout.tile_begin, offsets)[0], reference, [qkv])
