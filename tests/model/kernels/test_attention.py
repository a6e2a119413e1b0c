from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.launches import LaunchCounter
from model.attention import ISAB, fold_projections
from model.kernels import ops
from model.kernels.ops import choose_kernels
from tests.model.kernels.helpers import CORNERS, by_set, check, layout_of


def check_gather(sizes: list[int], heads: int, points: int, width: int) -> None:
    layout, scale = layout_of(sizes), 1 / math.sqrt(width)
    projected = torch.randn(layout.num_slots, heads * (width + points), requires_grad=True)
    num_rows = layout.num_rows(points)

    def found() -> Tensor:
        return ops.gather(projected, layout.sets, heads, points, num_rows, scale)[0]

    def expected() -> Tensor:
        rows = [projected[:0, :width]]
        for x, size in zip(by_set(projected, layout.slot_offsets), layout.sizes.tolist(), strict=True):
            values = x[:size, : heads * width].view(size, heads, width)
            weights = (x[:size, heads * width :].view(size, heads, points) * scale).softmax(0)
            rows.append(torch.einsum("nhm,nhd->md", weights, values)[: 1 if len(x) == 1 else None])
        return torch.cat(rows)

    check(found, expected, [projected])


def check_scatter(sizes: list[int], heads: int, points: int, width: int) -> None:
    layout, scale = layout_of(sizes), 1 / math.sqrt(width)
    queries = torch.randn(layout.num_slots, heads * width, requires_grad=True)
    keys = torch.randn(layout.num_rows(points), width, requires_grad=True)

    def found() -> Tensor:
        return ops.scatter(queries, keys, layout.sets, heads, points, scale)

    def expected() -> Tensor:
        out = [queries[:0]]
        rows = keys.split([1 if len(x) == 1 else points for x in by_set(queries, layout.slot_offsets)])
        for x, of_set in zip(by_set(queries, layout.slot_offsets), rows, strict=True):
            out.append(((x.view(len(x), heads, width) * scale @ of_set.T).softmax(2) @ of_set).flatten(1))
        return torch.cat(out)

    check(found, expected, [queries, keys])


@pytest.mark.parametrize(("heads", "points", "width"), [(2, 4, 64), (2, 16, 32), (3, 5, 24), (1, 20, 16)])
@pytest.mark.parametrize("sizes", [CORNERS, [1, 1], [5], []], ids=["corners", "single", "one", "none"])
def test_sets_of_corner_sizes(sizes: list[int], heads: int, points: int, width: int) -> None:
    check_gather(sizes, heads, points, width)
    check_scatter(sizes, heads, points, width)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_blocks_whose_projections_are_folded_at_once(heads: int, number: int) -> None:
    """As each block does it by itself in PyTorch, with the gradients of all parameters; kernels or not."""
    torch.manual_seed(0)
    blocks = [ISAB(12, heads, 20, points=5) for _ in range(number)]
    layout = layout_of(CORNERS)
    x = torch.randn(layout.num_slots, 12, requires_grad=True)

    def found() -> Tensor:
        folded = fold_projections(blocks)
        return torch.cat([block(x, layout, own) for block, own in zip(blocks, folded, strict=True)])

    def expected() -> Tensor:
        with choose_kernels(False):
            return torch.cat([block(x, layout) for block in blocks])

    check(found, expected, [x, *(parameter for block in blocks for parameter in block.parameters())])


def test_the_gradients_of_folded_weights_are_not_copied() -> None:
    """A gradient that comes transposed would cost a copy for each block."""
    blocks = [ISAB(8, 2, 12, points=3).to("meta") for _ in range(2)]
    total = torch.stack([of.sum() for folded in fold_projections(blocks) for of in folded]).sum()
    with LaunchCounter() as counter:
        total.backward()
    assert counter.counts["", "bmm"] > 0
    assert counter.counts["", "copy_"] == 0


def test_a_set_of_500_events() -> None:
    check_gather([3, 500], 1, 4, 16)
    check_scatter([3, 500], 1, 4, 16)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 17))
def test_any_sizes(sizes: list[int], heads: int, points: int) -> None:
    check_gather(sizes, heads, points, 16)
    check_scatter(sizes, heads, points, 16)
