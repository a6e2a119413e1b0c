"""Samples are windows on patients that are stored once; the reference stores a copy of the patient for each sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.noise import PatientNoise
from model.prefixes import Prefixes
from pipeline import make_loader
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader
from pipeline.prepare.tasks import write_task
from pipeline.schema import UserError
from pipeline.storage.ahead import AheadFolder
from tests.conftest import ragged_sizes
from tests.data_dirs import Patient, add_task, in_stored_order, make_patients, write_data_dir
from tests.pipeline.loading.test_batch import assert_equal, batch_of

GROUP_EVENTS = 250


class Windows(NamedTuple):
    """A data directory with a task, and its samples with events in the order of the task's table."""

    directory: Path
    samples: list[Patient]


def draw_samples(patients: Sequence[Patient], *, seed: int, most: int = 4) -> list[tuple[Patient, float, int | None]]:
    """Up to ``most`` prediction minutes of each patient, before, at, between and after its sets."""
    rng, samples = np.random.default_rng(seed), []
    for patient in patients:
        minutes = [minute for minute, _ in patient.sets]
        times = {
            float(rng.choice(minutes)) + float(rng.choice([-0.25, 0.0, 0.25, 5000.0, -5000.0])) for _ in range(most)
        }
        samples += [(patient, time, (0, 1, None)[int(rng.integers(3))]) for time in sorted(times)]
    return samples


def make_windows(
    directory: Path, *, seed: int = 0, num_patients: int = 20, name: str = "default", **flags: Any
) -> Windows:
    patients = make_patients(ragged_sizes(num_patients, seed=seed), seed=seed)
    write_data_dir(directory, {"train": patients}, **flags)
    drawn = draw_samples(in_stored_order(patients), seed=seed)
    for path in (directory / "tasks").iterdir():
        path.unlink()
    add_task(directory, drawn[::-1], name)
    cut = [patient.until(time, label) for patient, time, label in drawn]
    return Windows(directory, [sample for sample in cut if sample.sets])


def bake(directory: Path, samples: Sequence[Patient]) -> Path:
    """A data directory in which each sample is a patient of its own, named by patient and prediction time."""
    copies = [replace(sample, patient_id=f"{sample.patient_id}@{sample.prediction_time!r}") for sample in samples]
    return write_data_dir(directory, {"train": copies}, keep_order=True)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """Samples of 20 patients in four shards that are alike."""
    return make_windows(tmp_path_factory.mktemp("data"), dealt=True)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 5),
    batch_size=st.integers(1, 9),
    flags=st.fixed_dictionaries(
        {
            "max_events": st.none() | st.integers(100, 300),
            "shuffle": st.booleans(),
            "bucketing": st.booleans(),
            "max_sequence_length": st.none() | st.integers(1, 30),
            "truncate": st.sampled_from(["earliest", "latest", "random"]),
            "world_size": st.integers(1, 3),
        }
    ),
)
def test_windows_are_the_baked_copies_bit_for_bit(seed: int, batch_size: int, flags: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        directory, samples = make_windows(Path(name, "windows"), seed=seed)
        baked = bake(Path(name, "baked"), samples)
        for rank in range(flags["world_size"]):
            options = {"batch_size": batch_size, "seed": seed, "rank": rank, **flags}
            ours, theirs = make_loader(directory, **options), make_loader(baked, **options)
            assert len(ours) == len(theirs)
            assert ours.longest_patient == theirs.longest_patient
            for _ in range(2):
                for window, copy in zip(ours, theirs, strict=True):
                    assert window.sample_key == copy.patient_id
                    assert_equal(replace(window, patient_id=window.sample_key), copy)


def assert_are_windows(batches: Sequence[PatientBatch], samples: Sequence[Patient]) -> None:
    """Each batch holds what its samples are, and each sample is in one batch."""
    by_key = {f"{sample.patient_id}@{sample.prediction_time!r}": sample for sample in samples}
    for batch in batches:
        assert_equal(batch, batch_of([by_key[key] for key in batch.sample_key]))
    assert Counter(chain.from_iterable(batch.sample_key for batch in batches)) == Counter(by_key.keys())


@settings(max_examples=30)
@given(
    batch_size=st.integers(1, 12),
    group_events=st.sampled_from([GROUP_EVENTS, 10**6]),
    seed=st.integers(0, 9),
    done=st.integers(0, 5),
    before=st.integers(1, 3),
    after=st.integers(1, 3),
)
def test_every_sample_once_an_epoch_in_groups_too_and_resumed_on_other_ranks(
    windows: Windows, batch_size: int, group_events: int, seed: int, done: int, before: int, after: int
) -> None:
    def open_ranks(world_size: int) -> list[PatientLoader]:
        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "group_events": group_events}
        return [
            make_loader(windows.directory, rank=rank, world_size=world_size, **options) for rank in range(world_size)
        ]

    whole = list(open_ranks(1)[0])
    assert_are_windows(whole, windows.samples)
    ranks, kept = open_ranks(before), []
    streams = [iter(loader) for loader in ranks]
    for _ in range(min(done, len(whole))):
        kept += [next(stream) for stream in streams]
    state = ranks[0].state_dict()
    resumed = open_ranks(after)
    for loader in resumed:
        loader.load_state_dict(state)
    assert_are_windows([*kept, *chain.from_iterable(resumed)], windows.samples)


def test_the_default_truncation_is_the_latest_where_there_are_prediction_times(windows: Windows) -> None:
    assert make_loader(windows.directory).options.truncate == "latest"
    assert make_loader(windows.directory, task=None).options.truncate == "earliest"
    by_key = {f"{sample.patient_id}@{sample.prediction_time!r}": sample for sample in windows.samples}
    for batch in make_loader(windows.directory, batch_size=4, max_sequence_length=3):
        cut = [by_key[key] for key in batch.sample_key]
        assert_equal(batch, batch_of([sample.kept(max(sample.num_events - 3, 0), 3) for sample in cut]))


def test_without_a_task_patients_are_whole_and_unlabelled(windows: Windows) -> None:
    batches = list(make_loader(windows.directory, task=None, batch_size=6))
    assert sum(batch.num_patients for batch in batches) == 20
    assert all(batch.prediction_time is None for batch in batches)
    assert {label for batch in batches for label in batch.label.tolist()} == {-1}


def test_a_task_that_is_not_there_is_named(windows: Windows) -> None:
    with pytest.raises(UserError, match=r"has no task 'aki'; add it with python -m pipeline\.tasks add"):
        make_loader(windows.directory, task="aki")


def test_another_task_of_the_same_name_is_not_resumed(tmp_path: Path) -> None:
    first, second = (make_windows(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0)))
    assert make_loader(first.directory).state_dict() == make_loader(second.directory).state_dict()
    other = draw_samples(make_patients(ragged_sizes(20, seed=0), seed=0), seed=7)
    for path in (second.directory / "tasks").iterdir():
        path.unlink()
    add_task(second.directory, other)
    with pytest.raises(UserError, match=r"cannot resume: task was .*default"):
        make_loader(second.directory).load_state_dict(make_loader(first.directory).state_dict())


def test_quarantined_shards_take_their_samples_along(windows: Windows) -> None:
    paths = [entry.path for entry in Manifest.load(windows.directory).splits["train"]]
    task = Task.load(windows.directory, Manifest.load(windows.directory), "default")
    left = make_loader(windows.directory, quarantined=paths[:1], batch_size=5)
    assert left.num_samples == len(windows.samples) - task.shards[paths[0]]
    assert sum(batch.num_patients for batch in left) == left.num_samples


def test_patients_are_in_memory_once_however_many_samples_they_have(tmp_path: Path) -> None:
    patients = make_patients([[3, 3, 3]] * 4)
    write_data_dir(tmp_path, {"train": patients})
    times = np.linspace(3000, 9000, 200).tolist()
    add_task(tmp_path, [(patient, time, 1) for patient in patients for time in times], "many")
    loader = make_loader(tmp_path, task="many", batch_size=100)
    assert len(loader) == 8
    group = loader._load_group(loader._group, AheadFolder(loader._folder, 0))
    assert (len(group.store.code), group.store.num_patients, group.plan.batches.batch_sizes.sum()) == (36, 4, 800)


def test_samples_without_events_are_in_no_batch_and_are_counted(windows: Windows) -> None:
    loader = make_loader(windows.directory)
    task = Task.load(windows.directory, Manifest.load(windows.directory), "default")
    empty = loader.read_empty_samples(task)
    assert empty.num_rows == task.splits["train"].num_without_events > 0
    assert task.splits["train"].num_samples == loader.num_samples + empty.num_rows
    assert set(empty["num_events"].to_pylist()) == {0}


@pytest.mark.parametrize("minute", [None, 40.0])
def test_events_of_excluded_codes_are_in_no_sample(tmp_path: Path, minute: float | None) -> None:
    patients = [
        Patient(patient_id="a", label=1, sets=[(0.0, [(3, 1.0), (5, 2.0)]), (10.0, [(5, 1.0)]), (30.0, [(4, 1.0)])]),
        Patient(patient_id="b", label=0, sets=[(0.0, [(5, 1.0)]), (40.0, [(4, None), (5, 0.5)]), (41.0, [(4, 9.0)])]),
        Patient(patient_id="c", label=0, sets=[(1.0, [(5, 1.0)])]),
    ]
    write_data_dir(tmp_path, {"train": patients})
    import polars as pl

    from pipeline.prepare.sources.labels import Labels

    frame = pl.DataFrame({"patient_id": ["a", "b", "c"], "label": [1, 0, 0]}, schema_overrides={"label": pl.Int8})
    if minute is not None:
        frame = frame.with_columns(prediction_minute=pl.lit(minute))
    task = write_task(tmp_path, Manifest.load(tmp_path), "some", Labels.of_frame("labels", frame), ("^v5$",))
    assert task.excluded_codes == [1, 5]
    assert task.splits["train"].num_without_events == 1
    (batch,) = make_loader(tmp_path, task="some", batch_size=9, shuffle=False)
    a = Patient(patient_id="a", label=1, sets=[(0.0, [(3, 1.0)]), (30.0, [(4, 1.0)])])
    b_sets = [(40.0, [(4, None)]), (41.0, [(4, 9.0)])][: 1 if minute else 2]
    expected = {"a": a, "b": Patient(patient_id="b", label=0, sets=b_sets)}
    assert_equal(batch, batch_of([expected[name] for name in batch.patient_id]))
    assert sorted(batch.patient_id) == ["a", "b"]


def test_noise_tells_the_samples_of_a_patient_apart_and_whole_patients_keep_theirs(windows: Windows) -> None:
    batch = next(iter(make_loader(windows.directory, batch_size=1000)))
    assert len(set(batch.patient_id)) < batch.num_patients == len(set(batch.sample_key))
    key = PatientNoise.for_step(batch.sample_key, seed=1, step=2).key
    assert len(key.unique()) == batch.num_patients
    whole = next(iter(make_loader(windows.directory, task=None, batch_size=1000)))
    assert whole.sample_key == whole.patient_id
    by_id = PatientNoise.for_step(whole.patient_id, seed=1, step=2).key
    assert torch.equal(PatientNoise.for_step(whole.sample_key, seed=1, step=2).key, by_id)


def test_parts_of_a_batch_keep_their_prediction_times(windows: Windows) -> None:
    batch = next(iter(make_loader(windows.directory, batch_size=7)))
    assert batch.prediction_time is not None
    assert batch.between(2, 5).prediction_time == batch.prediction_time[2:5]
    again = PatientBatch.from_padded(batch.to_padded(), batch.patient_id, batch.prediction_time)
    assert again.sample_key == batch.sample_key
    with pytest.raises(ValueError, match="prediction_time has 6 items for 7 patients"):
        replace(batch, prediction_time=batch.prediction_time[:6])


def separate(batch: PatientBatch) -> PatientBatch:
    """The samples of a batch as patients of their own."""
    samples = batch.samples
    assert samples is not None
    each = Prefixes(samples.patient, samples.num_sets).separate(batch)
    return replace(each, label=samples.label, prediction_time=samples.prediction_time)


def by_sample(batches: Sequence[PatientBatch]) -> dict[str, PatientBatch]:
    """Each sample as a batch of its own."""
    found = {key: batch.between(i, i + 1) for batch in batches for i, key in enumerate(batch.sample_key)}
    assert len(found) == sum(batch.num_patients for batch in batches)
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 5),
    batch_size=st.integers(1, 9),
    group_events=st.sampled_from([GROUP_EVENTS, 10**6]),
    limit=st.none() | st.integers(1, 30),
    truncate=st.sampled_from(["earliest", "latest"]),
    world_size=st.integers(1, 2),
)
def test_samples_that_share_windows_are_the_samples(
    seed: int, batch_size: int, group_events: int, limit: int | None, truncate: str, world_size: int
) -> None:
    with TemporaryDirectory() as name:
        directory, samples = make_windows(Path(name), seed=seed, dealt=True)
        options: dict[str, Any] = {"batch_size": batch_size, "group_events": group_events, "world_size": world_size}
        options |= {"max_sequence_length": limit, "truncate": truncate, "seed": seed}
        shared, alone = (
            [make_loader(directory, **options, rank=rank, share_windows=share) for rank in range(world_size)]
            for share in (True, False)
        )
        assert shared[0].num_samples <= alone[0].num_samples == len(samples)
        batches = [batch for loader in shared for batch in loader]
        assert sum(batch.num_patients for batch in batches) == shared[0].num_samples
        found, expected = (by_sample(list(each)) for each in (map(separate, batches), chain.from_iterable(alone)))
        assert found.keys() == expected.keys()
        for key, batch in found.items():
            assert_equal(batch, expected[key])


def test_the_samples_of_a_patient_are_in_one_batch_and_its_events_once(tmp_path: Path) -> None:
    patients = make_patients([[3, 3, 3]] * 4)
    write_data_dir(tmp_path, {"train": patients})
    add_task(
        tmp_path, [(each, minute + late, 1) for each in patients for minute, _ in each.sets for late in (0, 0.1)], "m"
    )
    loader = make_loader(tmp_path, task="m", batch_size=3, share_windows=True)
    batches = list(loader)
    # A window of one set is apart, as its minute would be another if it were static.
    assert loader.num_samples == sum(batch.num_patients for batch in batches) == 8
    assert sum(batch.num_samples for batch in batches) == 24
    for batch in batches:
        assert batch.samples is not None
        assert batch.num_samples == len(batch.sample_names[0]) == len(batch.sample_label)
        assert batch.samples.whole.tolist() == np.flatnonzero(np.diff([*batch.samples.patient.tolist(), -1])).tolist()
