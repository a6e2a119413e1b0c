from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ragged import SetLayout, round_up

SIZES = st.lists(st.integers(1, 70) | st.integers(1, 9), max_size=40)


def offsets(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)


def test_size_classes() -> None:
    sizes = np.array([1, 2, 7, 8, 9, 10, 11, 16, 17, 20, 21, 32, 33, 40, 65, 129])
    assert round_up(sizes).tolist() == [1, 2, 7, 8, 10, 10, 12, 16, 20, 20, 24, 32, 40, 40, 80, 160]


def test_size_classes_are_few_and_waste_little() -> None:
    sizes = np.arange(1, 100_000)
    padded = round_up(sizes)
    assert (padded >= sizes).all()
    assert (padded[8:] <= sizes[8:] * 1.25).all()
    assert len(np.unique(padded)) <= 8 + 4 * 14


def test_layout_by_hand() -> None:
    """Sets of 2, 9 and 1 events: order by size is third, first, second; the set of 9 stands in 10 slots."""
    layout = SetLayout.build(offsets([2, 9, 1]))
    assert layout.set_order.tolist() == [2, 0, 1]
    assert layout.set_rank.tolist() == [1, 2, 0]
    assert [(c.num_sets, c.size) for c in layout.classes] == [(1, 1), (1, 2), (1, 10)]
    assert layout.event_of_slot.tolist() == [11, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]
    assert layout.mask.tolist() == [1] * 12 + [0]
    assert [c.is_padded for c in layout.classes] == [False, False, True]
    assert [mask is None for mask in layout.split_mask()] == [True, True, False]
    assert layout.set_of_slot.tolist() == [0, 1, 1] + [2] * 10


@given(SIZES)
def test_every_event_stands_in_one_slot_among_its_own_set(sizes: list[int]) -> None:
    layout = SetLayout.build(offsets(sizes))
    mask = layout.mask
    assert sorted(layout.event_of_slot[mask].tolist()) == list(range(sum(sizes)))
    set_of_event = np.repeat(np.arange(len(sizes)), sizes)
    set_of_slot = layout.set_order[layout.set_of_slot] if sizes else layout.event_of_slot
    assert set_of_slot.tolist() == set_of_event[layout.event_of_slot.numpy()].tolist()
    assert sum(c.num_slots for c in layout.classes) == layout.num_slots
    assert sum(c.num_sets for c in layout.classes) == len(sizes)


@given(SIZES)
def test_mean_is_each_sets_mean(sizes: list[int]) -> None:
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0))
    layout = SetLayout.build(offsets(sizes))
    found = layout.mean(values[layout.event_of_slot])[layout.set_rank]
    expected = [part.mean(0) for part in values.split(sizes)] if sizes else []
    for row, mean in zip(found, expected, strict=True):
        torch.testing.assert_close(row, mean)


def test_padding_slots_do_not_enter_the_mean() -> None:
    layout = SetLayout.build(offsets([9]))
    rows = torch.ones(10, 1)
    rows[9] = 1e9
    assert layout.mean(rows).item() == 1.0


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no events"):
        SetLayout.build(torch.tensor([0, 2, 2]))
