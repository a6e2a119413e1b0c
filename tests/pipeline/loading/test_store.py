from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.arrays import offsets_from_sizes
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import SampleIndex, Samples
from pipeline.dataset.tasks import Task
from pipeline.loading.options import LoaderOptions, Truncate
from pipeline.loading.store import PatientStore, Windows
from pipeline.storage.folder import Folder
from tests.data_dirs import Patient, in_stored_order
from tests.pipeline.loading.test_batch import assert_equal, batch_of


class Loaded(NamedTuple):
    """The patients of a split in memory, and the samples of the task that has their labels."""

    store: PatientStore
    samples: Samples


def load(directory: Path, split: str = "train") -> Loaded:
    manifest = Manifest.load(directory)
    entries = manifest.splits[split]
    task = Task.load(directory, manifest, "default")
    store = PatientStore(directory, entries)
    for number in reversed(range(len(entries))):  # in any order
        store.read(number, directory)
    return Loaded(store, SampleIndex(Folder(directory), manifest, task and (task,)).read(entries))


def select(
    loaded: Loaded, max_sequence_length: int | None = None, truncate: Truncate = "earliest", seed: int = 0
) -> Windows:
    options = LoaderOptions(max_sequence_length=max_sequence_length, truncate=truncate)
    windows = Windows.of(loaded.samples, options, np.random.default_rng(seed))
    for number in range(loaded.store.num_shards):
        loaded.store.locate(windows, number)
    return windows


@pytest.fixture(scope="module")
def loaded(data_dir: Path) -> Loaded:
    return load(data_dir)


@given(
    picked=st.lists(st.lists(st.integers(0, 52), max_size=6), min_size=1, max_size=4),
    max_sequence_length=st.none() | st.integers(1, 60),
    truncate=st.sampled_from(["earliest", "latest", "random"]),
)
def test_gathering_and_truncation_against_a_loop(
    loaded: Loaded,
    patients: list[Patient],
    picked: list[list[int]],
    max_sequence_length: int | None,
    truncate: Truncate,
) -> None:
    windows = select(loaded, max_sequence_length, truncate, 5)
    first = windows.event_start - select(loaded).event_start  # random places are checked below
    stored = in_stored_order(patients)
    most = max_sequence_length or 10**9
    if truncate == "earliest":
        assert not first.any()
    if truncate == "latest":
        assert first.tolist() == [max(patient.num_events - most, 0) for patient in stored]

    kept = [patient.kept(int(skip), most) for patient, skip in zip(stored, first, strict=True)]
    assert windows.num_events.tolist() == [patient.num_events for patient in kept]
    assert windows.num_sets.tolist() == [patient.num_sets for patient in kept]
    chosen = np.array([patient for part in picked for patient in part], dtype=np.int64)
    batches = loaded.store.gather_batches(windows, chosen, offsets_from_sizes(np.array([len(part) for part in picked])))
    for batch, part in zip(batches, picked, strict=True):
        expected = batch_of([kept[patient] for patient in part])
        assert_equal(batch, expected)
        whole = loaded.store.gather_global_batch(windows, np.array(part, dtype=np.int64))
        assert whole.sample_key == expected.patient_id
        assert whole.num_sets.tolist() == expected.sets_per_patient.tolist()
        assert whole.set_size.tolist() == expected.set_sizes.tolist()
        assert whole.num_sets.dtype == whole.set_size.dtype == np.int64


def test_random_windows_lie_inside_and_reach_both_ends(loaded: Loaded) -> None:
    whole = select(loaded)
    seen = set()
    for seed in range(60):
        cut = select(loaded, 10, "random", seed)
        first = cut.event_start - whole.event_start
        assert (first >= 0).all()
        assert (first + cut.num_events <= whole.num_events).all()
        seen.add(int(first[20]))
    assert whole.num_events[20] > 10
    assert seen == set(range(int(whole.num_events[20]) - 10 + 1))


def test_a_limit_beyond_all_patients_changes_nothing(loaded: Loaded) -> None:
    limited, whole = select(loaded, 10_000, "latest"), select(loaded)
    for name in ("event_start", "num_events", "set_start", "num_sets"):
        assert getattr(limited, name).tolist() == getattr(whole, name).tolist()


def test_what_is_gathered_can_be_changed_without_changing_the_store(loaded: Loaded) -> None:
    windows, some = select(loaded), np.arange(3)
    loaded.store.gather_batches(windows, some, offsets_from_sizes(np.array([3])))[0].value.fill_(7)
    assert not (loaded.store.value == 7).any()


def test_a_split_may_be_empty_or_one_patient(data_dir: Path) -> None:
    empty = load(data_dir, "test")
    assert (empty.store.num_patients, load(data_dir, "valid").store.num_patients) == (0, 1)
    nobody = np.array([], dtype=np.int64)
    (batch,) = empty.store.gather_batches(select(empty, 3), nobody, offsets_from_sizes(np.array([0])))
    assert (batch.num_patients, batch.num_sets, batch.num_events) == (0, 0, 0)
