"""Epochs that do not use each sample once: what they draw, whoever loads it, and from wherever it goes on."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.patients import SplitPart
from pipeline.loading.loader import PatientLoader, make_loader
from pipeline.schema import UserError
from tests.data_dirs import Patient, add_task, make_patients, write_data_dir
from tests.faults.conftest import cases
from tests.pipeline.loading.test_loader import ids, joined

LABELS = [*([0] * 40), *([1] * 8), *([None] * 5)]
"""Of the 53 patients: 40 negative, 8 positive, 5 without a label."""


@pytest.fixture(scope="module")
def labelled(patients: list[Patient]) -> list[Patient]:
    labels = np.random.default_rng(0).permutation(np.array(LABELS, object)).tolist()
    return [replace(each, label=label) for each, label in zip(patients, labels, strict=True)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, labelled: list[Patient]) -> Path:
    valid = make_patients([[2, 3]], prefix="v")
    return write_data_dir(tmp_path_factory.mktemp("data"), {"train": labelled, "valid": valid}, dealt=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, labelled: list[Patient]) -> Path:
    """Weight 0, 1, 2 … 52, in a CSV file."""
    path = tmp_path_factory.mktemp("weights") / "weights.csv"
    rows = [f"{patient.patient_id},{number}" for number, patient in enumerate(labelled)]
    path.write_text("\n".join(["patient_id,weight", *rows]) + "\n", encoding="utf-8")
    return path


def labels_of(loader: PatientLoader) -> Counter[int]:
    return Counter(label for batch in loader for label in batch.label.tolist())


@settings(max_examples=cases(12, 60))
@given(
    group_events=st.integers(100, 2000),
    batch_size=st.integers(1, 20),
    max_events=st.none() | st.integers(100, 300),
    flags=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 99),
            "shuffle": st.booleans(),
            "bucketing": st.booleans(),
            "max_sequence_length": st.none() | st.integers(1, 60),
            "truncate": st.sampled_from(["earliest", "latest", "random"]),
        }
    ),
)
def test_classes_are_equally_frequent_in_epochs_as_long_as_before(
    data_dir: Path,
    labelled: list[Patient],
    group_events: int,
    batch_size: int,
    max_events: int | None,
    flags: dict[str, Any],
) -> None:
    limits = {"group_events": group_events, "batch_size": batch_size, "max_events": max_events}
    loader = make_loader(data_dir, sampling="balanced", **limits, **flags)
    assert loader.num_samples == 53
    for epoch in range(2):
        promised, batches = len(loader), list(loader)
        assert len(batches) == promised
        used = Counter(itertools.chain.from_iterable(ids(batches)))
        by_class = {label: [used[p.patient_id] for p in labelled if p.label == label] for label in (0, 1, None)}
        assert {label: sum(counts) for label, counts in by_class.items()} == {0: 24, 1: 24, None: 5}
        assert set(by_class[1]) == {3}
        assert set(by_class[0]) == {0, 1}
        assert set(by_class[None]) == {1}, "those without a label are used as they were"
        if max_events is None:
            sizes = [batch.num_patients for batch in batches]
            assert sorted(sizes)[1:] == [batch_size] * (promised - 1)
        else:
            assert all(batch.num_events <= max_events for batch in batches)
        different = sum(map(bool, used.values()))
        assert loader.count_draws(epoch) == {
            "samples": 53,
            "different_samples": different,
            "class_0": 24,
            "class_1": 24,
        }


@pytest.mark.parametrize(
    ("world_size", "prefetch", "sampling"), [(1, 2, "balanced"), (2, 0, "weights"), (3, 2, "balanced")]
)
def test_batches_depend_on_neither_ranks_nor_prefetch_and_their_counts_are_exact(
    data_dir: Path, weights: Path, world_size: int, prefetch: int, sampling: str
) -> None:
    flags: dict[str, Any] = {"group_events": 440, "batch_size": 5, "sampling": sampling}
    flags |= {"sampling_weights": str(weights) if sampling == "weights" else None}
    reference = make_loader(data_dir, prefetch=0, **flags)
    counted = {"transform": lambda batch, place: (batch, place.counts)}
    ranks = [
        make_loader(data_dir, **flags, rank=rank, world_size=world_size, prefetch=prefetch, **counted)
        for rank in range(world_size)
    ]
    for _ in range(2):
        whole = list(reference)
        for batch, *shares in zip(whole, *ranks, strict=True):
            assert sorted(joined([share for share, _ in shares])) == sorted(batch.patient_id)
            for _, counts in shares:
                labelled = int((batch.label >= 0).sum())
                assert (counts.num_patients, counts.num_events) == (batch.num_patients, batch.num_events)
                assert counts.num_labelled == (labelled,)


def test_no_batch_holds_a_patient_twice_where_others_are_as_long(tmp_path: Path) -> None:
    patients = make_patients([[4]] * 60)
    labelled = [replace(patient, label=int(number < 6)) for number, patient in enumerate(patients)]
    loader = make_loader(write_data_dir(tmp_path / "data", {"train": labelled}), batch_size=5, sampling="balanced")
    for batch in itertools.chain.from_iterable(loader for _ in range(3)):
        assert len(set(batch.patient_id)) == 5
    assert loader.count_draws(0) == {"samples": 60, "different_samples": 36, "class_0": 30, "class_1": 30}


@settings(max_examples=cases(10, 40))
@given(cursor=st.integers(0, 25), group_events=st.sampled_from([440, 10**6]), max_events=st.none() | st.just(150))
def test_an_epoch_goes_on_in_its_middle(data_dir: Path, cursor: int, group_events: int, max_events: int | None) -> None:
    flags: dict[str, Any] = {"sampling": "balanced", "group_events": group_events, "max_events": max_events}
    walked, resumed = (make_loader(data_dir, batch_size=5, prefetch=0, **flags) for _ in range(2))
    stream = itertools.chain.from_iterable(walked for _ in range(4))
    for _ in itertools.islice(stream, cursor):
        pass
    resumed.load_state_dict(walked.state_dict())
    onwards = itertools.chain.from_iterable(resumed for _ in range(4))
    for _ in range(15):
        ours, other = next(stream), next(onwards)
        assert (ours.patient_id, ours.code.tolist()) == (other.patient_id, other.code.tolist())


def test_a_state_of_other_draws_is_refused(data_dir: Path, weights: Path, tmp_path: Path) -> None:
    drawn = make_loader(data_dir, sampling="weights", sampling_weights=str(weights))
    with pytest.raises(UserError, match="sampling was weights and is now natural"):
        make_loader(data_dir).load_state_dict(drawn.state_dict())
    other = tmp_path / "other.csv"
    other.write_text(weights.read_text(encoding="utf-8").replace(",52", ",53"), encoding="utf-8")
    with pytest.raises(UserError, match="sampling_weights was"):
        make_loader(data_dir, sampling="weights", sampling_weights=str(other)).load_state_dict(drawn.state_dict())
    moved = tmp_path / "moved.csv"
    moved.write_bytes(weights.read_bytes())
    make_loader(data_dir, sampling="weights", sampling_weights=str(moved)).load_state_dict(drawn.state_dict())


def test_samples_are_drawn_in_proportion_to_weights(data_dir: Path, weights: Path, labelled: list[Patient]) -> None:
    loader = make_loader(data_dir, sampling="weights", sampling_weights=str(weights), group_events=440)
    total = Counter[str]()
    for epoch in range(6):
        used = Counter(itertools.chain.from_iterable(ids(loader)))
        assert sum(used.values()) == 53
        assert sum((loader.count_draws(epoch) or {}).values()) == 53 + len(used) + sum(
            used[patient.patient_id] for patient in labelled if patient.label is not None
        )
        total.update(used)
        for number, patient in enumerate(labelled):
            due = 53 * number / sum(range(53))
            assert int(due) <= used[patient.patient_id] <= int(due) + 1
            assert abs(total[patient.patient_id] - (epoch + 1) * due) < 2


def test_samples_of_a_patient_have_weights_of_their_own_or_the_patient_s(
    tmp_path: Path, labelled: list[Patient]
) -> None:
    data = write_data_dir(tmp_path / "data", {"train": labelled})
    minutes = {patient.patient_id: patient.sets[-1][0] for patient in labelled}
    samples = [(patient, minutes[patient.patient_id] + late, 1) for patient in labelled for late in (0.0, 1.0)]
    add_task(data, samples, "twice")
    names = [patient.patient_id for patient, *_ in samples]
    times, weight = [minute for _, minute, _ in samples], [float(late) for _ in labelled for late in (0, 1)]
    of_samples = pa.table({"patient_id": names, "prediction_minute": times, "weight": weight})
    pq.write_table(of_samples, tmp_path / "samples.parquet")
    flags = {"task": "twice", "sampling": "weights"}
    loader = make_loader(data, sampling_weights=str(tmp_path / "samples.parquet"), **flags)
    used = Counter(
        (name, time) for batch in loader for name, time in zip(batch.patient_id, batch.prediction_time, strict=True)
    )
    assert used == {(name, minute + 1.0): 2 for name, minute in minutes.items()}

    pq.write_table(
        of_samples.select(["patient_id", "weight"]).slice(1).take([*range(0, 105, 2)]), tmp_path / "p.parquet"
    )
    loader = make_loader(data, sampling_weights=str(tmp_path / "p.parquet"), **flags)
    assert Counter(itertools.chain.from_iterable(ids(loader))) == dict.fromkeys(minutes, 2)


def test_a_part_of_a_split_and_quarantine_are_balanced_by_who_is_left(data_dir: Path, labelled: list[Patient]) -> None:
    entries = Manifest.load(data_dir).splits["train"]
    quarantined = [entry.path for entry in entries[:3]]
    chosen = {entry.path: np.arange(entry.num_patients) % 2 == 0 for entry in entries}
    everyone = set(itertools.chain.from_iterable(ids(make_loader(data_dir))))
    for given_flags in ({"quarantined": quarantined}, {"split": SplitPart("train", chosen)}):
        natural = make_loader(data_dir, **given_flags)
        loader = make_loader(data_dir, **given_flags, sampling="balanced")
        assert natural.num_samples == loader.num_samples < 53
        left, before = set(itertools.chain.from_iterable(ids(natural))), labels_of(natural)
        found = [
            (name, label)
            for batch in loader
            for name, label in zip(batch.patient_id, batch.label.tolist(), strict=True)
        ]
        assert {name for name, _ in found} <= left < everyone
        counts = Counter(label for _, label in found)
        assert counts[-1] == before[-1]
        assert counts[0] - counts[1] in (0, 1)
        assert counts.total() == natural.num_samples


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sampling": "balanced", "task": None}, "--sampling balanced is for one task of classes"),
        ({"sampling": "weights"}, "--sampling weights and --sampling_weights FILE go together"),
        ({"sampling_weights": "w.csv"}, "--sampling weights and --sampling_weights FILE go together"),
        ({"sampling": "balanced", "share_windows": True}, "--sampling balanced .* --share_windows"),
        ({"sampling": "none"}, "--sampling must be natural or balanced or weights"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(data_dir: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loader(data_dir, **flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("patient_id,weight\np0/ü,1\n", "52 of 53 samples have no weight"),
        ("patient_id,weight\np0/ü,-1\n", "1 rows lack a patient, or a weight of 0 or more"),
        ("patient_id,weight\np0/ü,\n", "1 rows lack a patient, or a weight of 0 or more"),
        ("patient_id,weight\np0/ü,inf\n", "1 rows lack a patient, or a weight of 0 or more"),
        ("patient_id,weight\np0/ü,1\np0/ü,2\n", "1 samples stand twice"),
        ("patient_id,weight,prediction_minute\np0/ü,1,5\n", "column prediction_minute is not what the samples have"),
        ("patient,weight\np0/ü,1\n", "columns patient_id and weight"),
        ("patient_id,weight\n" + "".join(f"p{n}/ü,0\n" for n in range(53)), "all samples have weight 0"),
        (None, "cannot be read"),
    ],
)
def test_weights_that_say_too_little_are_refused(
    data_dir: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "weights.csv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as raised:
        make_loader(data_dir, sampling="weights", sampling_weights=str(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "p0" not in str(raised.value)
