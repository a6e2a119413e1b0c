"""Operations counted from shapes, against PyTorch's own counter and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.losses import LossOptions, compute_losses
from model.seqsetvae import SeqSetVAE
from tests.model.helpers import counts_of, random_batch, run_model, tiny_model
from training.flops import step_flops

aten = torch.ops.aten


def _product(_: Any, left: Any, right: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: SeqSetVAE, sets: list[list[int]]) -> tuple[float, float]:
    """(found by the counter, found from shapes) of a forward and a backward pass."""
    batch = random_batch(sets)
    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: _product}) as counter:
        output = run_model(model, batch, seed=0)
        compute_losses(output, batch.label, LossOptions(), counts_of(batch), beta=0.1).total.backward()
    return counter.get_total_flops(), sum(step_flops(batch, model.config).values())


# No set is padded up to 8, and every patient has all of the few codes or few enough that its variables are not.
SETS = [[1, 3, 2, 1, 8], [5, 6], [7, 2, 2, 1]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variable_axis": False},
        {"event_form": "product"},
        {"levels": 1},
        {"levels": 3, "heads": 4, "inducing_points": 5},
        {"frozen_embeddings": True},
    ],
)
def test_agrees_with_the_counter_where_nothing_is_padded(changes: dict[str, Any]) -> None:
    found, expected = counted(tiny_model(layers=0, **changes), SETS)
    assert found == expected


def test_agrees_with_the_counter_but_for_attention_over_sets_that_it_does_not_count_on_a_cpu() -> None:
    found, expected = counted(tiny_model(layers=2), SETS)
    width, pairs = 16, sum(count * (count + 1) // 2 for count in (5, 2, 4))
    assert expected - found == 2 * 3 * 2 * 2 * pairs * width  # layers, passes, multiply and add, two products


def test_agrees_with_the_counter_when_the_feed_forward_runs_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.feed_forward.PIECE_ROWS", 4)
    found, expected = counted(tiny_model(layers=0), SETS)
    assert found == expected


def test_padding_rows_do_not_count() -> None:
    """A set of nine events has ten rows."""
    found, expected = counted(tiny_model(layers=0), [[9, 9, 9]])
    assert expected < found < 1.15 * expected
