"""Folded attention against attention written out, and the identities it rests on."""

from __future__ import annotations

import pytest
import torch

from model.attention import ISAB, MAB, PMA, OneKeyMAB
from model.ragged import SetLayout
from tests.model import reference

WIDTH, SIZES = 8, [3, 1, 9, 2, 3, 17, 1]


@pytest.fixture
def layout() -> SetLayout:
    return SetLayout.build(torch.tensor([0, *torch.tensor(SIZES).cumsum(0)]))


@pytest.fixture
def events() -> torch.Tensor:
    return torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(1))


def real_sets(rows: torch.Tensor, layout: SetLayout) -> list[torch.Tensor]:
    """The real rows of each set, in the batch's order of sets."""
    padded = [c.size for c in layout.classes for _ in range(c.num_sets)]
    in_order = [part[: int(size)] for part, size in zip(rows.split(padded), layout.size, strict=True)]
    return [in_order[int(rank)] for rank in layout.set_rank]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_isab_agrees_set_by_set(heads: int, layout: SetLayout, events: torch.Tensor) -> None:
    torch.manual_seed(0)
    block = ISAB(WIDTH, heads, 12, points=5)
    found = real_sets(block(events[layout.event_of_row], layout), layout)
    for rows, x in zip(found, events.split(SIZES), strict=True):
        torch.testing.assert_close(rows, reference.isab(block, x), atol=1e-5, rtol=1e-5)


def test_pma_agrees_set_by_set(layout: SetLayout, events: torch.Tensor) -> None:
    torch.manual_seed(0)
    block, seeds = PMA(WIDTH, 2, 12), torch.randn(20, WIDTH)
    found = real_sets(block(seeds, events[layout.event_of_row], layout), layout)
    for rows, x in zip(found, events.split(SIZES), strict=True):
        torch.testing.assert_close(rows, reference.pma(block, seeds[: len(x)], x), atol=1e-5, rtol=1e-5)


def test_one_key_is_what_any_query_gets() -> None:
    """A full MAB with whatever queries, on one key, is a :class:`OneKeyMAB` with the product of its projections."""
    torch.manual_seed(0)
    full, short = MAB(WIDTH, 2, 12), OneKeyMAB(WIDTH, 12)
    with torch.no_grad():
        short.value.weight.copy_(full.output.weight @ full.value.weight)
        short.value.bias.copy_(full.output(full.value.bias))
    short.tail.load_state_dict(full.tail.state_dict())
    queries, key = torch.randn(4, WIDTH), torch.randn(1, WIDTH)
    torch.testing.assert_close(reference.mab(full, queries, key), short(key).expand(4, -1), atol=1e-5, rtol=1e-5)


def test_padding_rows_are_never_attended_to(layout: SetLayout, events: torch.Tensor) -> None:
    torch.manual_seed(0)
    block = ISAB(WIDTH, 2, 12, points=5)
    rows = events[layout.event_of_row]
    assert (layout.real_row == 0).any()
    changed = torch.where(layout.real_row[:, None] == 0, torch.full_like(rows, 1e4), rows)
    for a, b in zip(real_sets(block(rows, layout), layout), real_sets(block(changed, layout), layout), strict=True):
        torch.testing.assert_close(a, b)
