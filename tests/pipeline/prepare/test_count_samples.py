"""Samples are counted alike in however many parts they come."""

from __future__ import annotations

from dataclasses import asdict
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.tasks import SampleCounts
from pipeline.prepare import count_samples
from pipeline.prepare.count_samples import SampleCounter, cut_ranges
from pipeline.prepare.sources.labels import Labels
from pipeline.schema import Kind

Patient = tuple[str, list[tuple[float | None, int]]]
"""A split, and label and number of events of each sample."""

LABEL = st.none() | st.integers(0, 1).map(float)
PATIENTS = st.lists(
    st.tuples(st.sampled_from(["train", "valid"]), st.lists(st.tuples(LABEL, st.integers(0, 2)), min_size=1)),
    max_size=12,
)


def count(patients: list[Patient], kind: Kind, parts: list[int], slice_rows: int) -> dict[str, SampleCounts]:
    nobody = pl.DataFrame(schema={"patient_id": pl.String, "label": pl.Float64})
    counter = SampleCounter(Labels.of_frame("labels", nobody, kind, () if kind == "regression" else ("0", "1")))
    start = 0
    with patch.object(count_samples, "SLICE_ROWS", slice_rows):
        while start < len(patients):
            parts, size = parts[1:] + parts[:1], parts[0]
            rows = [
                (str(number), split, label, num_events)
                for number, (split, samples) in enumerate(patients[start : start + size], start)
                for label, num_events in samples
            ]
            schema = {"patient_id": pl.String, "split": pl.String, "label": pl.Float64, "num_events": pl.Int32}
            counter.add(pl.DataFrame(rows, schema=schema, orient="row"))
            start += size
        return counter.finish()


@given(
    patients=PATIENTS,
    kind=st.sampled_from(["binary", "regression"]),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    slice_rows=st.integers(1, 9),
)
def test_counts_are_those_of_all_samples(
    patients: list[Patient], kind: Kind, parts: list[int], slice_rows: int
) -> None:
    found = count(patients, kind, parts, slice_rows)
    assert found == count(patients, kind, [100], slice_rows)  # to the bit
    for split in ("train", "valid", "test"):
        own = [samples for name, samples in patients if name == split]
        labels = [label for samples in own for label, _ in samples if label is not None]
        moments = (np.mean(labels), np.std(labels)) if labels and kind == "regression" else (None, None)
        assert asdict(found[split]) == {
            "num_samples": sum(map(len, own)),
            "num_patients": len(own),
            "num_labelled": len(labels),
            "num_without_events": sum(num_events == 0 for samples in own for _, num_events in samples),
            "class_counts": [] if kind == "regression" else [labels.count(0.0), labels.count(1.0)],
            "mean": moments[0] if moments[0] is None else pytest.approx(moments[0]),
            "std": moments[1] if moments[1] is None else pytest.approx(moments[1], abs=1e-9),
        }


def test_ranges_hold_few_rows_or_one_part() -> None:
    assert list(cut_ranges(np.array([3, 2, 0, 9, 1, 1, 0]), 5)) == [(0, 3), (3, 4), (4, 7)]
    assert list(cut_ranges(np.array([], np.int64), 5)) == []
    assert list(cut_ranges(np.array([0, 0]), 1)) == [(0, 2)]
