"""Several data directories as one: the same batches as of one directory that holds the patients of all."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.joined import JoinedFolder, _add_counts
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import SampleIndex
from pipeline.dataset.tasks import SampleCounts, Task, load_tasks
from pipeline.loading.loader import PatientLoader, make_loader
from pipeline.schema import INDEX_FILE, UserError
from pipeline.storage.folder import Folder
from tests.conftest import ragged_sizes
from tests.data_dirs import (
    Patient,
    add_task,
    in_stored_order,
    make_patients,
    pieces_of,
    rewrite_task,
    write_data_dir,
)
from tests.pipeline.loading.test_batch import assert_equal
from tests.pipeline.loading.test_loader import ids

PLACES = {
    "1/": {"train": make_patients(ragged_sizes(20)), "valid": make_patients([[2, 3], [1]], prefix="v")},
    "2/": {"train": make_patients(ragged_sizes(13, seed=1), seed=1), "test": make_patients([[4]], prefix="t")},
}
"""Patients of two places, which call theirs alike."""


def called_by(prefix: str, patients: list[Patient]) -> list[Patient]:
    return [replace(patient, patient_id=prefix + patient.patient_id) for patient in in_stored_order(patients)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("places")
    folders = [write_data_dir(root / prefix, place) for prefix, place in PLACES.items()]
    for folder, place in zip(folders, PLACES.values(), strict=True):
        patients = list(itertools.chain.from_iterable(place.values()))
        ends = [(patient, patient.sets[-1][0], patient.label) for patient in patients]
        add_task(folder, [*ends, *((patient, patient.sets[0][0] - 1, 1) for patient in patients)], "early")
        rewrite_task(folder, row_group_size=4, piece_bytes=300)
        pieces = {INDEX_FILE: pieces_of((folder / INDEX_FILE).read_bytes(), 300)}
        replace(Manifest.load(folder), pieces=pieces).save(folder)
    return folders


@pytest.fixture(scope="module")
def joined(places: list[Path]) -> JoinedFolder:
    return JoinedFolder([Folder(place) for place in places])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {
        split: [p for prefix, place in PLACES.items() for p in called_by(prefix, place.get(split, []))]
        for split in ("train", "valid", "test")
    }
    return write_data_dir(tmp_path_factory.mktemp("single"), splits, keep_order=True)


def assert_same_epochs(left: PatientLoader, right: PatientLoader) -> None:
    for _ in range(2):
        for ours, other in zip(left, right, strict=True):
            assert ours.patient_id == other.patient_id
            assert_equal(ours, other)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"split": "valid", "shuffle": False},
        {"split": "test"},
        {"task": None, "max_sequence_length": 9, "truncate": "random"},
        {"group_events": 300, "max_events": 150},
        {"group_events": 300, "sampling": "balanced"},
    ],
)
def test_batches_are_those_of_one_data_set(joined: JoinedFolder, single: Path, flags: dict[str, Any]) -> None:
    flags = {"batch_size": 5, **flags}
    assert_same_epochs(make_loader(joined, **flags), make_loader(single, **flags))


def test_a_task_has_the_counts_of_one_data_set(joined: JoinedFolder, single: Path) -> None:
    ours, other = (Task.load(each, Manifest.load(each), "default") for each in (joined, single))
    assert ours.splits == other.splits
    assert sorted(ours.shards.values()) == sorted(other.shards.values())
    assert ours.prior() == other.prior()
    (task,) = load_tasks(joined, Manifest.load(joined), "early")
    loader = make_loader(joined, task="early", share_windows=True)
    assert sum(batch.samples.label.shape[0] for batch in loader) == sum(
        task.shards[e.path] for e in loader.manifest.splits["train"]
    )
    assert loader.read_empty_samples(task).num_rows == task.splits["train"].num_without_events


def test_an_epoch_draws_from_data_sets_in_the_proportions_asked_for(joined: JoinedFolder) -> None:
    own = {
        "1/": {p.patient_id: p.label for p in PLACES["1/"]["train"]},
        "2/": {p.patient_id: p.label for p in PLACES["2/"]["train"]},
    }
    for sampling, group_events in itertools.product(("natural", "balanced"), (300, 10**6)):
        loader = make_loader(
            joined, data_weights=(1.0, 2.0), sampling=sampling, group_events=group_events, batch_size=4
        )
        used = Counter(itertools.chain.from_iterable(ids(loader)))
        of_place = {prefix: {n: used[prefix + n] for n in names} for prefix, names in own.items()}
        assert {prefix: sum(counts.values()) for prefix, counts in of_place.items()} == {"1/": 11, "2/": 22}
        counted = loader.count_draws(0)
        assert counted is not None
        assert (counted["data_set_1"], counted["data_set_2"], counted["samples"]) == (11, 22, 33)
        if sampling == "natural":
            assert set(of_place["1/"].values()) == {0, 1}
            assert set(of_place["2/"].values()) == {1, 2}
        else:
            for prefix, names in own.items():
                classes = Counter({0: 0, 1: 0})
                for name, label in names.items():
                    classes[label] += of_place[prefix][name]
                assert abs(classes[0] - classes[1]) <= 1
        resumed = make_loader(
            joined, data_weights=(1.0, 2.0), sampling=sampling, group_events=group_events, batch_size=4
        )
        stream = iter(loader)
        next(stream)
        resumed.load_state_dict(loader.state_dict())
        assert ids(resumed) == ids(stream)
        with pytest.raises(UserError, match=r"data_weights was \[1.0, 2.0\] and is now \[2.0, 1.0\]"):
            make_loader(
                joined, data_weights=(2.0, 1.0), sampling=sampling, group_events=group_events, batch_size=4
            ).load_state_dict(loader.state_dict())


def test_data_sets_that_are_not_alike_are_refused_by_name(places: list[Path], tmp_path: Path) -> None:
    other = write_data_dir(tmp_path / "other", {"train": make_patients([[1]])}, num_codes=20)
    for second, message in (
        (other, rf"--data_dir {other}: has another vocabulary than {places[0]}; prepare it with .* --like {places[0]}"),
        (places[0], "names a data set twice"),
        (tmp_path / "nothing", "no manifest here"),
    ):
        with pytest.raises(UserError, match=message):
            JoinedFolder([Folder(places[0]), Folder(second)])
    third = write_data_dir(tmp_path / "third", {"train": make_patients([[3, 1]], prefix="c")})
    mixed = JoinedFolder([Folder(places[0]), Folder(third)])
    with pytest.raises(UserError, match=rf"{third}: has no task 'early'"):
        make_loader(mixed, task="early")
    with pytest.raises(UserError, match="has no task 'none'"):
        make_loader(mixed, task="none")
    add_task(third, [(make_patients([[3, 1]], prefix="c")[0], None, 1)], "early")
    with pytest.raises(UserError, match=rf"{third}: task early has other times than that of {places[0]}"):
        make_loader(mixed, task="early")


@pytest.mark.parametrize(
    ("weights", "flags", "message"),
    [
        ((1.0,), {}, "--data_weights: 1 weights for 2 data sets"),
        ((1.0, 0.0), {}, "--data_weights must be above 0"),
        ((1.0, 2.0), {"share_windows": True}, "--data_weights .* --share_windows"),
        ((1.0, 2.0), {"split": "valid"}, "a data set has no samples to draw"),
    ],
)
def test_weights_that_make_no_sense_are_refused(
    joined: JoinedFolder, weights: tuple[float, ...], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_loader(joined, data_weights=weights, **flags)


def test_a_damaged_file_is_named_where_it_lies(places: list[Path], joined: JoinedFolder, tmp_path: Path) -> None:
    copy = write_data_dir(tmp_path / "copy", PLACES["2/"])
    mixed = JoinedFolder([Folder(places[0]), Folder(copy)])
    (copy / "train" / "00001.parquet").write_bytes(b"no shard")
    with pytest.raises(UserError, match=rf"{copy}/train/00001\.parquet"):
        list(make_loader(mixed))
    bad = ["2/train/00001.parquet"]
    left = make_loader(mixed, quarantined=bad, data_weights=(1.0, 1.0))
    assert sum(batch.num_patients for batch in left) == 33 - 5


NUMBERS = st.lists(st.floats(-100, 100), max_size=9).map(np.array)


@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_means_and_deviations_are_those_of_all_labels(parts: list[Any]) -> None:
    of_parts = [
        SampleCounts(num_samples=len(p), num_labelled=len(p), mean=float(p.mean()), std=float(p.std()))
        if len(p)
        else SampleCounts()
        for p in parts
    ]
    together, labels = _add_counts(of_parts), np.concatenate(parts)
    assert together.num_labelled == len(labels)
    if len(labels):
        assert together.mean == pytest.approx(labels.mean(), abs=1e-9)
        assert together.std == pytest.approx(labels.std(), abs=1e-6)
    else:
        assert together.mean is together.std is None


def test_rows_come_shard_after_shard_in_whatever_order_these_are_asked_for(joined: JoinedFolder) -> None:
    entries = Manifest.load(joined).splits["train"]
    chosen = [entries[-1], entries[0], entries[-2]]
    found = SampleIndex(joined, Manifest.load(joined)).read(chosen).num_events.tolist()
    parts = [SampleIndex(joined, Manifest.load(joined)).read([entry]).num_events.tolist() for entry in chosen]
    assert found == [*itertools.chain.from_iterable(parts)]
