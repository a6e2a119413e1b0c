from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import names, sort_samples
from pipeline.prepare.sort_samples import ContradictionError, SampleSorter, SortedSamples, cut_ranges
from pipeline.schema import Times, UserError

Sample = tuple[str, int, float | None]


def sort(parts: Sequence[Sequence[Sample]], times: Times | None = "date") -> SortedSamples:
    sorter = SampleSorter(times)
    for part in parts:
        patient = names.encode(pl.Series([patient for patient, *_ in part], dtype=pl.String))
        label = np.array([math.nan if label is None else label for *_, label in part], np.float64)
        sorter.add(patient, np.array([time for _, time, _ in part]), label)
    return sorter.finish()


def rows(samples: SortedSamples, patients: Sequence[int]) -> list[Sample]:
    records = samples.gather(np.array(patients, np.int64))
    return [
        (samples.patients[int(patient)], time, None if math.isnan(label) else label)
        for patient, time, label in records.tolist()
    ]


SAMPLES = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-3, 3), st.sampled_from([0.0, 1.0, None])), max_size=12),
    max_size=6,
)


@given(
    parts=SAMPLES,
    run_rows=st.integers(1, 9),
    stride=st.integers(1, 4),
    times=st.sampled_from(["date", "minute"]),
    names_asked=st.lists(st.sampled_from("fedcba"), unique=True),
    read_at_once=st.tuples(st.sampled_from([0, 40, 1 << 16]), st.sampled_from([24, 60, 1 << 22])),
)
def test_sorted_on_disk_or_in_memory_as_a_dictionary_says(
    parts: list[list[Sample]],
    run_rows: int,
    stride: int,
    times: Any,
    names_asked: list[str],
    read_at_once: tuple[int, int],
) -> None:
    labels: dict[tuple[str, int], set[float | None]] = {}
    for patient, time, label in (sample for part in parts for sample in part):
        labels.setdefault((patient, time), set()).add(label)
    with patch.object(sort_samples, "RUN_ROWS", run_rows), patch.object(sort_samples, "STRIDE", stride):
        if any(len(given_ - {None}) > 1 for given_ in labels.values()):
            with pytest.raises(ContradictionError) as found:
                sort(parts, times)
            assert len(labels[found.value.patient, found.value.time] - {None}) > 1
            return
        samples = sort(parts, times)
    expected = {key: next(iter(found - {None}), None) for key, found in labels.items()}
    assert sorted(samples.patients) == sorted({patient for patient, _ in expected})
    numbers = {name: number for number, name in enumerate(samples.patients)}
    by_hand = [
        (patient, time, label)
        for name in names_asked
        for (patient, time), label in sorted(expected.items(), key=lambda item: item[0])
        if patient == name
    ]
    max_gap, max_read = read_at_once
    with patch.object(sort_samples, "MAX_GAP", max_gap), patch.object(sort_samples, "MAX_READ", max_read):
        assert rows(samples, [numbers[name] for name in names_asked if name in numbers]) == by_hand
    assert samples.sizes.tolist() == [sum(patient == name for patient, _ in expected) for name in samples.patients]


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sort_samples, "RUN_ROWS", 1)
    monkeypatch.setattr(sort_samples.tempfile, "mkstemp", fail)
    with pytest.raises(UserError, match=r"no space left to sort labels in .*TMPDIR"):
        sort([[("a", 1, 1.0)]])


def test_ranges_hold_few_rows_or_one_part() -> None:
    assert list(cut_ranges(np.array([3, 2, 0, 9, 1, 1, 0]), 5)) == [(0, 3), (3, 4), (4, 7)]
    assert list(cut_ranges(np.array([], np.int64), 5)) == []
    assert list(cut_ranges(np.array([0, 0]), 1)) == [(0, 2)]
