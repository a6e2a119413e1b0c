from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import ops
from model.reconstruction import MIN_NORM, chamfer_sums
from tests.model.kernels.helpers import CORNERS, check, layout_of


def check_distances(sizes: list[int], width: int, *, change: bool = False) -> None:
    layout = layout_of(sizes)
    target, output = torch.randn(2, layout.num_slots, width).unbind()
    if change:  # the same vector twice, at no distance, and as good as no vector
        target[-2], output[-1] = target[-1], target[-1]
        output[0] *= 1e-8
    output.requires_grad_()

    def found() -> Tensor:
        return ops.chamfer(target, output, layout.tiles, MIN_NORM)[0]

    def expected() -> Tensor:
        with ops.choose_kernels(False):
            return torch.stack(chamfer_sums(target, output, layout))

    check(found, expected, [output])


@pytest.mark.parametrize("sizes", [CORNERS, [1, 1], [5], []], ids=["corners", "single", "one", "none"])
def test_sets_of_corner_sizes(sizes: list[int]) -> None:
    check_distances(sizes, 24)


def test_vectors_that_are_equal_or_have_no_direction() -> None:
    check_distances([4, 20], 24, change=True)


def test_a_set_of_100_events() -> None:
    check_distances([3, 100], 16)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=3))
def test_any_sizes(sizes: list[int]) -> None:
    check_distances(sizes, 16)
