"""Folded attention against attention written out, and the identities it rests on."""

from __future__ import annotations

import pytest
import torch

from model.attention import ISAB
from model.ragged import SetLayout
from tests.model import reference

WIDTH, SIZES = 8, [3, 1, 9, 2, 3, 17, 1]


@pytest.fixture
def layout() -> SetLayout:
    return SetLayout.build(torch.tensor([0, *torch.tensor(SIZES).cumsum(0)]))


@pytest.fixture
def events() -> torch.Tensor:
    return torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(1))


def unpadded_sets(x: torch.Tensor, layout: SetLayout) -> list[torch.Tensor]:
    """The slots of each set without padding, in the batch's order of sets."""
    padded = [c.size for c in layout.classes for _ in range(c.num_sets)]
    in_order = [part[:size] for part, size in zip(x.split(padded), sorted(SIZES), strict=True)]
    return [in_order[int(rank)] for rank in layout.set_rank]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_isab_agrees_set_by_set(heads: int, layout: SetLayout, events: torch.Tensor) -> None:
    torch.manual_seed(0)
    block = ISAB(WIDTH, heads, 12, points=5)
    found = unpadded_sets(block(events[layout.event_of_slot], layout), layout)
    for found_x, x in zip(found, events.split(SIZES), strict=True):
        torch.testing.assert_close(found_x, reference.isab(block, x), atol=1e-5, rtol=1e-5)


def test_padding_slots_are_never_attended_to(layout: SetLayout, events: torch.Tensor) -> None:
    torch.manual_seed(0)
    block = ISAB(WIDTH, 2, 12, points=5)
    x = events[layout.event_of_slot]
    assert not layout.mask.all()
    changed = torch.where(layout.mask[:, None], x, torch.full_like(x, 1e4))
    for a, b in zip(
        unpadded_sets(block(x, layout), layout), unpadded_sets(block(changed, layout), layout), strict=True
    ):
        torch.testing.assert_close(a, b)
