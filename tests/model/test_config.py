from __future__ import annotations

from typing import Any

import pytest

from model.config import SeqSetVAEConfig
from pipeline.schema import UserError
from training.options import parse_options

NEEDED = ["--data_dir", "d", "--output_dir", "r"]


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


def test_flags_have_their_types_and_defaults() -> None:
    options = parse_options([*NEEDED, "--batch_size", "8", "--no-bucketing", "--max_sequence_length", "300"])
    assert (options.batch_size, options.bucketing, options.max_sequence_length) == (8, False, 300)
    assert options.use_dynamic_padding is None
    assert parse_options([*NEEDED, "--no-use_dynamic_padding"]).use_dynamic_padding is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--batch_size", "many"], "--batch_size"),
        (["--dropout", "1.5"], "--dropout must be from 0 to 0.99"),
        (["--learning_rate", "nan"], "--learning_rate must be at least 0"),
        (["--precision", "int8"], "--precision"),
        (["--devices", "4", "--batch_size", "2"], "--devices 4 is more than --batch_size 2"),
        (["--batch", "3"], "--batch"),
    ],
)
def test_flags_out_of_range(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_options([*NEEDED, *flags])


def test_missing_directories() -> None:
    with pytest.raises(UserError, match="--data_dir is missing"):
        parse_options([])
    with pytest.raises(UserError, match="--output_dir is missing"):
        parse_options(["--data_dir", "d"])
