from __future__ import annotations

from typing import Any

import pytest

from model.config import SeqSetVAEConfig
from pipeline.schema import UserError


def test_reference_preset_is_the_designs() -> None:
    config = SeqSetVAEConfig.preset("reference", num_codes=43)
    found = (
        config.embedding_dim,
        config.width,
        config.feed_forward,
        config.levels,
        config.heads,
        config.inducing_points,
    )
    assert found == (768, 256, 256, 2, 2, 16)
    assert (config.set_feed_forward, config.layers, config.dropout) == (512, 2, 0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 30, "heads": 4},
        {"levels": 0},
        {"dropout": 1.0},
        {"num_codes": 1},
        {"event_form": "sum"},
        {"layers": -1},
        {"max_logvar": 0.0},
    ],
)
def test_nonsense_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        SeqSetVAEConfig(**{"num_codes": 9, **change})


def test_an_unknown_preset_is_refused_by_name() -> None:
    name: Any = "huge"
    with pytest.raises(UserError, match="not 'huge'"):
        SeqSetVAEConfig.preset(name, num_codes=9)
