from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import name_numbers
from pipeline.prepare.name_numbers import Hashes, NameNumbers


def hash_into(num_bits: int) -> object:
    """Hashes of so few bits that names share the first one, and never both."""

    def hash_names(names: pa.Array) -> tuple[Hashes, Hashes]:
        values = np.array([int(name) for name in names.to_pylist()], np.uint64)
        return values % np.uint64(1 << num_bits), values

    return hash_names


@given(
    parts=st.lists(st.lists(st.integers(0, 60), unique=True, max_size=20), max_size=12),
    num_bits=st.sampled_from([0, 1, 3, 64]),
)
def test_names_are_numbered_as_a_dictionary_does(parts: list[list[int]], num_bits: int) -> None:
    expected: dict[str, int] = {}
    numbers = NameNumbers()
    hash_names = hash_into(num_bits) if num_bits < 64 else name_numbers.hash_names
    with patch.object(name_numbers, "hash_names", hash_names):
        for part in parts:
            names = [str(number) for number in part]
            by_hand = [expected.setdefault(name, len(expected)) for name in names]
            assert numbers.number(pa.array(names, pa.large_string())).tolist() == by_hand
    assert len(numbers) == len(expected)
    assert numbers.names.to_pylist() == list(expected)
