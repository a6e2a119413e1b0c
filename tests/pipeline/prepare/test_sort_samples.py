from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import names, record_sorter
from pipeline.prepare.name_hashes import hash_names
from pipeline.prepare.sort_samples import ContradictionError, Hide, SampleSorter, SortedSamples
from pipeline.schema import Times

Sample = tuple[str, int, float | None]

SAMPLES = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-3, 3), st.sampled_from([0.0, 1.0, None])), max_size=12),
    max_size=6,
)


def sort(parts: Sequence[Sequence[Sample]], times: Times | None = "date", hide: Hide | None = None) -> SortedSamples:
    sorter = SampleSorter(times, hide)
    for part in parts:
        patient = names.encode(pl.Series([patient for patient, *_ in part], dtype=pl.String))
        label = np.array([math.nan if label is None else label for *_, label in part], np.float64)
        sorter.add(patient, np.array([time for _, time, _ in part]), label)
    return sorter.finish()


def name_of_hashes(known: str) -> dict[tuple[int, int], str]:
    first, second = hash_names(pl.Series(list(known)))
    return dict(zip(zip(first.tolist(), second.tolist(), strict=True), known, strict=True))


def rows(samples: SortedSamples, known: str = "abcdef") -> list[Sample]:
    """By name and time; the order within a name is that of the records."""
    name_of = name_of_hashes(known)
    found = [
        (name_of[first, second], time, None if math.isnan(label) else label)
        for first, second, _, time, label, _ in samples.records.read((None, None)).tolist()
    ]
    return sorted(found, key=lambda row: row[0])


@given(
    parts=SAMPLES,
    run_rows=st.integers(1, 9),
    stride=st.integers(1, 4),
    times=st.sampled_from(["date", "minute"]),
)
def test_sorted_on_disk_or_in_memory_as_a_dictionary_says(
    parts: list[list[Sample]], run_rows: int, stride: int, times: Any
) -> None:
    labels: dict[tuple[str, int], set[float | None]] = {}
    for patient, time, label in (sample for part in parts for sample in part):
        labels.setdefault((patient, time), set()).add(label)
    wrong = [key for key, given_ in labels.items() if len(given_ - {None}) > 1]
    with patch.object(record_sorter, "RUN_ROWS", run_rows), patch.object(record_sorter, "STRIDE", stride):
        if wrong:
            with pytest.raises(ContradictionError) as found:
                sort(parts, times)
            arrival = list(dict.fromkeys(patient for patient, _ in labels))
            first = min(wrong, key=lambda key: (arrival.index(key[0]), key[1]))
            assert (name_of_hashes("abcdef")[found.value.hashes], found.value.time) == first
            return
        samples = sort(parts, times)
        expected = {key: next(iter(found - {None}), None) for key, found in labels.items()}
        assert rows(samples) == [(*key, label) for key, label in sorted(expected.items(), key=lambda item: item[0])]
    assert len(samples) == len(expected)


def test_patients_are_called_as_the_data_set_calls_them() -> None:
    samples = sort([[("a", 1, 1.0), ("b", 1, 0.0), ("a", 0, None)]], hide=lambda texts: texts.str.to_uppercase())
    assert rows(samples, "AB") == [("A", 0, None), ("A", 1, 1.0), ("B", 1, 0.0)]
