from __future__ import annotations

import pytest

from pipeline.schema import UserError
from training.options import parse_train_options

NEEDED = ["--data_dir", "d", "--output_dir", "r"]


def test_flags_have_their_types_and_defaults() -> None:
    options = parse_train_options([*NEEDED, "--batch_size", "8", "--no-bucketing", "--max_sequence_length", "300"])
    assert (options.data.batch_size, options.data.bucketing, options.data.max_sequence_length) == (8, False, 300)
    assert options.data.use_dynamic_padding is None
    assert parse_train_options([*NEEDED, "--no-use_dynamic_padding"]).data.use_dynamic_padding is False


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
        parse_train_options([*NEEDED, *flags])


def test_missing_directories() -> None:
    with pytest.raises(UserError, match="--data_dir is missing"):
        parse_train_options([])
    with pytest.raises(UserError, match="--output_dir is missing"):
        parse_train_options(["--data_dir", "d"])
