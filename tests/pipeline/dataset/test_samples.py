"""Samples of several tasks are joined by patient and time; the reference is a dictionary."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import make_loader
from pipeline.arrays import offsets_from_sizes
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import SampleIndex, Samples, join_samples
from pipeline.dataset.tasks import load_tasks
from pipeline.schema import UserError
from pipeline.storage.folder import Folder
from tests.data_dirs import add_task, make_patients, write_data_dir

Rows = dict[tuple[int, float | None], int | float | None]

TIMES = st.sampled_from([None, -1.5, -0.0, 0.0, 3.0])


@st.composite
def tasks(draw: st.DrawFn) -> list[tuple[Rows, bool]]:
    """Rows of up to three tasks, and whether each is of numbers."""
    keys = st.tuples(st.integers(0, 4), TIMES)
    found = []
    for _ in range(draw(st.integers(2, 3))):
        is_number = draw(st.booleans())
        labels = st.none() | (st.floats(-4, 4, width=32) if is_number else st.integers(0, 2))
        found.append((draw(st.dictionaries(keys, labels, max_size=8)), is_number))
    return found


def as_samples(rows: Rows, *, is_number: bool, has_times: bool) -> Samples:
    keys = sorted(rows, key=lambda key: (key[0], np.inf if key[1] is None else key[1]))
    labels = [rows[key] for key in keys]
    label = np.array([np.nan if each is None else each for each in labels], np.float32)
    if not is_number:
        label = np.array([-1 if each is None else each for each in labels], np.int64)
    time = np.array([np.nan if key[1] is None else key[1] for key in keys], np.float64)
    patient = np.array([key[0] for key in keys], np.int64)
    amounts = {"num_events": 10 + patient, "num_sets": 1 + patient, "whole_sets": np.ones(len(patient), np.bool_)}
    return Samples(patient=patient, label=label, prediction_time=time if has_times else None, **amounts)


@given(tasks())
def test_each_sample_stands_once_with_a_label_of_each_task(given_tasks: list[tuple[Rows, bool]]) -> None:
    expected: dict[tuple[int, float | None], list[float]] = {}
    for number, (rows, _) in enumerate(given_tasks):
        for key, label in rows.items():
            labels = expected.setdefault(key, [np.nan] * len(given_tasks))
            labels[number] = np.nan if label is None else label
    has_times = [any(time is not None for _, time in rows) for rows, _ in given_tasks]
    pairs = zip(given_tasks, has_times, strict=True)
    found = join_samples([as_samples(rows, is_number=kind, has_times=times) for (rows, kind), times in pairs])
    time = found.prediction_time if found.prediction_time is not None else np.full(len(found.patient), np.nan)
    keys = [
        (patient, None if np.isnan(t) else t) for patient, t in zip(found.patient.tolist(), time.tolist(), strict=True)
    ]
    assert sorted(keys, key=str) == sorted(expected, key=str)
    assert keys == sorted(keys, key=lambda key: (key[0], np.inf if key[1] is None else key[1]))
    np.testing.assert_array_equal(
        found.label, np.array([expected[key] for key in keys], np.float32).reshape(found.label.shape)
    )
    np.testing.assert_array_equal(found.num_events, 10 + found.patient)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that share some samples, a third of whole patients, and one that excludes a code."""
    folder = tmp_path_factory.mktemp("data")
    patients = make_patients([[2, 1], [3], [1, 1, 1], [4]] * 5)
    write_data_dir(folder, {"train": patients}, shard_size=3)
    add_task(folder, [(patient, 1e5, 1) for patient in patients], "late")
    add_task(folder, [(patient, minute, 0) for patient in patients[:7] for minute in (1e5, 2e5, -1e7)], "some")
    return folder


def test_shared_samples_are_counted_as_they_are_read(directory: Path) -> None:
    manifest = Manifest.load(directory)
    index = SampleIndex(Folder(directory), manifest, load_tasks(directory, manifest, "late,some,default"))
    entries = manifest.splits["train"]
    samples = index.read(entries)
    assert len(samples.patient) == 20 + 7 + 20
    bounds = offsets_from_sizes(np.array([entry.num_patients for entry in entries], np.int64))
    inside = [int(((samples.patient >= a) & (samples.patient < b)).sum()) for a, b in pairwise(bounds)]
    assert index.count(entries).tolist() == inside
    loader = make_loader(directory, task="late, some,default", batch_size=4)
    assert (loader.num_samples, len(loader)) == (47, 12)
    batches = list(loader)
    assert sum(batch.num_patients for batch in batches) == 47
    assert all(batch.label.shape == (batch.num_patients, 3) for batch in batches)
    labelled = sum((~batch.label.isnan()).sum(0) for batch in batches)
    known = load_tasks(directory, manifest, "default")[0].splits["train"].num_labelled
    assert labelled.tolist() == [20, 14, known]  # type: ignore[union-attr]


def test_counting_in_pieces_is_counting(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(directory)
    tasks = load_tasks(directory, manifest, "late,some")
    entries = manifest.splits["train"]
    expected = SampleIndex(Folder(directory), manifest, tasks).count(entries)
    monkeypatch.setattr("pipeline.dataset.samples.JOINED_ROWS", 5)
    np.testing.assert_array_equal(SampleIndex(Folder(directory), manifest, tasks).count(entries), expected)


def test_tasks_that_cannot_share_samples_are_refused(directory: Path) -> None:
    manifest = Manifest.load(directory)
    with pytest.raises(UserError, match="names a task twice"):
        load_tasks(directory, manifest, "late,late")
    with pytest.raises(UserError, match="has no task 'none'"):
        load_tasks(directory, manifest, "late,none")
