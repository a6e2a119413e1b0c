"""Samples are joined with an index as a dictionary does it, and never more of both are read than a few ranges."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import record_sorter
from pipeline.prepare.join_samples import count_similar_strangers, join_samples, sort_patients
from pipeline.prepare.place_samples import place_samples
from pipeline.prepare.record_sorter import Run
from pipeline.prepare.sources.labels import Labels

NAMES = ["a", "A", "0a", "b", "00b", "0", "00", "c", "d", "e", "f"]


def cut(frame: pl.DataFrame, size: int) -> list[pl.DataFrame]:
    return [frame[start : start + size] for start in range(0, frame.height, size)]


def index_of(patients: list[str]) -> pl.DataFrame:
    columns = {"patient_id": pl.Series(patients, dtype=pl.String), "time_origin": pl.Series([None] * len(patients))}
    return pl.DataFrame(columns).with_row_index("position").cast({"time_origin": pl.Datetime("us")})


def labels_of(samples: dict[tuple[str, float], int | None], has_times: bool) -> Labels:
    columns = {
        "patient_id": pl.Series([name for name, _ in samples], dtype=pl.String),
        "label": pl.Series(list(samples.values()), dtype=pl.Int8),
        "prediction_minute": pl.Series([minute for _, minute in samples], dtype=pl.Float64),
    }
    return Labels.of_frame("labels", pl.DataFrame(columns).drop([] if has_times else ["prediction_minute"]))


def join(labels: Labels, index: pl.DataFrame, size: int) -> tuple[list[pl.DataFrame], int, int]:
    """The parts, and the numbers of patients found and of samples of strangers."""
    joined = join_samples(labels.samples, sort_patients(part["patient_id"] for part in cut(index, size)))
    return list(place_samples(labels, cut(index, size), joined.records)), joined.num_found, joined.num_strange


@given(
    patients=st.permutations(NAMES).flatmap(lambda names: st.integers(0, len(names)).map(lambda n: names[:n])),
    samples=st.dictionaries(
        st.tuples(st.sampled_from(NAMES), st.integers(-2, 4).map(float)), st.sampled_from([0, 1, None]), max_size=40
    ),
    has_times=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_joined_as_dictionaries_say(
    patients: list[str], samples: dict[tuple[str, float], Any], has_times: bool, sizes: tuple[int, int, int]
) -> None:
    if not has_times:
        samples = {(name, 0.0): label for (name, _), label in samples.items()}
    size, run_rows, stride = sizes
    with (
        patch.object(record_sorter, "RUN_ROWS", run_rows),
        patch.object(record_sorter, "STRIDE", stride),
    ):
        labels = labels_of(samples, has_times)
        parts, num_found, num_strange = join(labels, index_of(patients), size)
        num_similar = count_similar_strangers(labels.samples, [pl.Series(patients, dtype=pl.String)])
    expected = [
        (row, name, minute if has_times else None, label)
        for row, name in enumerate(patients)
        for minute, label in (
            sorted((minute, label) for (other, minute), label in samples.items() if other == name)
            if has_times
            else [(None, samples.get((name, 0.0)))]
        )
    ]
    found = [
        row for part in parts for row in part.select("position", "patient_id", "prediction_minute", "label").iter_rows()
    ]
    assert found == expected
    named = {name for name, _ in samples}
    assert num_found == len(named & set(patients))
    assert num_strange == sum(name not in patients for name, _ in samples)
    unlabelled = {name.lower().lstrip("0") for name in set(patients) - named}
    assert num_similar == sum(name.lower().lstrip("0") in unlabelled for name in named - set(patients))


@pytest.mark.parametrize("has_times", [False, True])
def test_what_is_held_does_not_follow_the_number_of_patients(monkeypatch: pytest.MonkeyPatch, has_times: bool) -> None:
    """Each time records are read they are a few ranges of ``RUN_ROWS``, and what stays is a key in ``STRIDE``."""
    monkeypatch.setattr(record_sorter, "RUN_ROWS", 256)
    monkeypatch.setattr(record_sorter, "STRIDE", 8)
    read, most = Run.read, 0

    def count(run: Run, keys: record_sorter.KeyRange) -> record_sorter.Records:
        nonlocal most
        found = read(run, keys)
        most = max(most, len(found))
        assert len(run.keys) <= math.ceil(run.num_rows / 8)
        assert not isinstance(run.content, np.ndarray)
        return found

    monkeypatch.setattr(Run, "read", count)
    patients = [f"p{number}" for number in range(8000)]
    samples = {(name, float(minute)): 1 for name in patients[::2] for minute in range(1 + has_times)}
    parts, num_found, _ = join(labels_of(samples, has_times), index_of(patients), 100)
    assert num_found == 4000
    assert sum(part.height for part in parts) == 8000
    assert max(part.height for part in parts) <= 100 * (1 + has_times)
    assert 100 < most <= 512
