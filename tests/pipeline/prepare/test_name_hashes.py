from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.name_hashes import hash_names, hash_similar, look_up

NUMBERS = st.lists(st.integers(0, 60), unique=True, max_size=20)


@given(known=NUMBERS, wanted=NUMBERS, num_bits=st.sampled_from([0, 1, 3, 64]))
def test_pairs_are_found_where_first_hashes_are_alike_too(known: list[int], wanted: list[int], num_bits: int) -> None:
    def hash_into(numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        values = np.array(numbers, np.uint64)
        return values % np.uint64(1 << num_bits) if num_bits < 64 else values, values

    first, second = hash_into(known)
    order = np.argsort(first, kind="stable")
    found = look_up(first[order], second[order], *hash_into(wanted))
    in_order = [known[at] for at in order]
    assert found.tolist() == [in_order.index(number) if number in known else -1 for number in wanted]


def test_hashes_follow_from_names() -> None:
    names = pl.Series(["1", "01", "a", "A", "", "0", "é"])
    pairs = list(zip(*(hashes.tolist() for hashes in hash_names(names)), strict=True))
    assert len(set(pairs)) == len(names)
    reversed_pairs = zip(*(hashes.tolist() for hashes in hash_names(names[::-1])), strict=True)
    assert list(reversed_pairs) == pairs[::-1]
    one, padded, lower, upper, nothing, zero, other = hash_similar(names).tolist()
    assert (one, lower, nothing) == (padded, upper, zero)
    assert len({one, lower, nothing, other}) == 4
