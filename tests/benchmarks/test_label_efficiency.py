from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.label_efficiency import choose_labelled


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.integers(0, 3))
def test_choices_are_nested_and_keep_the_proportion_of_the_classes(labels: list[int], seed: int) -> None:
    label = np.array(labels)
    before: set[int] = set()
    for number in range(1, len(label) + 1):
        chosen = choose_labelled(label, number, seed)
        assert len(set(chosen.tolist())) == number
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
        assert abs(label[chosen].sum() - number * label.mean()) <= 1
    assert choose_labelled(label, 0, seed).tolist() == [*range(len(label))]
