from __future__ import annotations

import doctest
import pickle
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pipeline.loading.batch
from pipeline.loading.batch import PatientBatch
from tests.data_dirs import Patient, expected_batch, make_patients

DTYPES = {
    "code": torch.int64,
    "value": torch.float32,
    "has_value": torch.bool,
    "set_offsets": torch.int64,
    "minute": torch.float32,
    "patient_offsets": torch.int64,
    "label": torch.int64,
}
SET_SIZES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5)


def batch_of(patients: list[Patient]) -> PatientBatch:
    fields = expected_batch(patients)
    tensors = {name: torch.tensor(fields[name], dtype=dtype) for name, dtype in DTYPES.items()}
    return PatientBatch(**tensors, patient_id=fields["patient_id"])


def assert_equal(actual: PatientBatch, expected: PatientBatch) -> None:
    for name, dtype in DTYPES.items():
        assert getattr(actual, name).dtype == dtype, name
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.patient_id == expected.patient_id


def test_padded_by_hand() -> None:
    batch = batch_of(
        [
            Patient(patient_id="a", label=1, sets=[(-2.0, [(5, 0.5)])]),
            Patient(patient_id="b", label=None, sets=[(0.0, [(3, None), (4, 1.5)]), (7.0, [(5, -1.0)])]),
        ]
    )
    padded = batch.to_padded(torch.arange(6.0)[:, None] * torch.ones(1, 2) + 1)
    assert padded["code"].tolist() == [[5, 0, 0], [3, 4, 5]]
    assert padded["val"].squeeze(-1).tolist() == [[0.5, 0, 0], [0, 1.5, -1]]
    assert padded["has_value"].tolist() == [[True, False, False], [False, True, True]]
    assert padded["minute"].squeeze(-1).tolist() == [[-2, 0, 0], [0, 0, 7]]
    assert padded["set_id"].squeeze(-1).tolist() == [[0, 0, 0], [0, 0, 1]]
    assert padded["padding_mask"].tolist() == [[False, True, True], [False, False, False]]
    assert padded["label"].tolist() == [1, -1]
    assert padded["var"][..., 0].tolist() == [[6, 0, 0], [4, 5, 6]]
    assert {name: tensor.shape for name, tensor in padded.items()} == {
        "code": (2, 3), "val": (2, 3, 1), "has_value": (2, 3), "minute": (2, 3, 1), "set_id": (2, 3, 1),
        "padding_mask": (2, 3), "label": (2,), "var": (2, 3, 2),
    }  # fmt: skip


@given(SET_SIZES)
def test_padded_against_a_loop(set_sizes: list[list[int]]) -> None:
    patients = make_patients(set_sizes)
    padded = batch_of(patients).to_padded()
    width = max((patient.num_events for patient in patients), default=0)
    assert padded["code"].shape == (len(patients), width)
    for row, patient in enumerate(patients):
        cells = [
            (code, 0.0 if value is None else value, value is not None, minute, set_id, False)
            for set_id, (minute, events) in enumerate(patient.sets)
            for code, value in events
        ]
        cells += [(0, 0.0, False, 0.0, 0, True)] * (width - len(cells))
        for name, expected in zip(
            ("code", "val", "has_value", "minute", "set_id", "padding_mask"), zip(*cells, strict=True), strict=True
        ):
            assert padded[name][row].flatten().tolist() == pytest.approx(expected), name


@given(SET_SIZES, st.integers(0, 7))
def test_from_padded_undoes_to_padded_with_any_padding(set_sizes: list[list[int]], extra: int) -> None:
    batch = batch_of(make_patients(set_sizes))
    width = int(batch.events_per_patient.max()) if set_sizes else 0
    assert_equal(PatientBatch.from_padded(batch.to_padded(pad_to=width + extra), batch.patient_id), batch)


def test_padding_to_less_than_the_longest_patient_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_to=3 is less than the 4 events"):
        batch_of(make_patients([[2, 2]])).to_padded(pad_to=3)


def test_sizes_and_counts() -> None:
    batch = batch_of(make_patients([[1, 2], [4]]))
    assert (batch.num_patients, batch.num_sets, batch.num_events) == (2, 3, 7)
    assert batch.set_sizes.tolist() == [1, 2, 4]
    assert batch.sets_per_patient.tolist() == [2, 1]
    assert batch.events_per_patient.tolist() == [3, 4]


def test_moving_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = batch_of(make_patients([[1, 2]]))
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in DTYPES)
    assert moved.patient_id == batch.patient_id
    assert_equal(batch.to("cpu", non_blocking=True), batch)


def test_a_batch_cannot_be_changed() -> None:
    batch = batch_of(make_patients([[1]]))
    with pytest.raises(AttributeError):
        batch.code = batch.code  # type: ignore[misc]
    assert replace(batch, patient_id=["other"]).patient_id == ["other"]


@given(SET_SIZES, st.randoms())
def test_kept_events_stand_in_the_sets_they_stood_in(sizes: list[list[int]], random: Random) -> None:
    patients = make_patients(sizes)
    keep = [[[random.random() < 0.6 for _ in events] for _, events in patient.sets] for patient in patients]
    naive = []
    for patient, of_patient in zip(patients, keep, strict=True):
        sets = [
            (minute, [event for event, kept in zip(events, of_set, strict=True) if kept])
            for (minute, events), of_set in zip(patient.sets, of_patient, strict=True)
        ]
        naive.append(replace(patient, sets=[(minute, events) for minute, events in sets if events]))
    flat = [kept for of_patient in keep for of_set in of_patient for kept in of_set]
    assert_equal(batch_of(patients).keep_events(torch.tensor(flat, dtype=torch.bool)), batch_of(naive))


@given(SET_SIZES, st.data())
def test_some_patients_of_a_batch_are_a_batch(set_sizes: list[list[int]], data: st.DataObject) -> None:
    patients = make_patients(set_sizes)
    start = data.draw(st.integers(0, len(patients)))
    stop = data.draw(st.integers(start, len(patients)))
    assert_equal(batch_of(patients).between(start, stop), batch_of(patients[start:stop]))


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(pipeline.loading.batch)
    assert (failed, tried) == (0, 5)


@given(SET_SIZES)
def test_each_set_and_each_event_knows_where_it_stands(set_sizes: list[list[int]]) -> None:
    batch = batch_of(make_patients(set_sizes))
    patient_of_set = [patient for patient, sizes in enumerate(set_sizes) for _ in sizes]
    flat = [size for sizes in set_sizes for size in sizes]
    set_of_event = [number for number, size in enumerate(flat) for _ in range(size)]
    for moved in (batch, batch.to("cpu"), pickle.loads(pickle.dumps(batch))):
        assert moved.patient_of_set.tolist() == patient_of_set
        assert moved.set_of_event.tolist() == set_of_event
        assert moved.patient_of_set.dtype == moved.set_of_event.dtype == torch.int64


def test_derived_tensors_are_computed_once_and_move_with_the_batch() -> None:
    batch = batch_of(make_patients([[1, 2], [4]]))
    early = batch.to("meta")
    assert batch.patient_of_set is batch.patient_of_set
    assert batch.set_of_event is batch.set_of_event
    moved = batch.to("meta")
    assert {"patient_of_set", "set_of_event"} <= vars(moved).keys()
    assert moved.patient_of_set.device.type == moved.set_of_event.device.type == "meta"
    some = replace(batch, patient_id=["a", "b"])
    for other in (early, some):
        assert not {"patient_of_set", "set_of_event"} & vars(other).keys(), "another batch has its own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": torch.ones(7, dtype=torch.int32)}, r"code is torch.int32 \[7\], but 2 .* need torch.int64 \[7\]"),
        ({"code": torch.ones(1, 7, dtype=torch.int64)}, r"code is torch.int64 \[1, 7\]"),
        ({"value": torch.ones(6)}, r"value is torch.float32 \[6\], but .* 7 events need torch.float32 \[7\]"),
        ({"value": torch.ones(7, dtype=torch.float64)}, "value is torch.float64"),
        ({"has_value": torch.ones(7)}, "has_value is torch.float32"),
        ({"minute": torch.ones(2)}, r"set_offsets is torch.int64 \[4\], but .* need torch.int64 \[3\]"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"label is torch.int64 \[3\]"),
        ({"patient_id": ["a"]}, r"patient_offsets is torch.int64 \[3\], but 1 patients"),
        ({"set_offsets": torch.tensor([1, 1, 3, 7])}, "set_offsets must begin at 0 and end at 7, not at 1 and 7"),
        ({"set_offsets": torch.tensor([0, 1, 3, 6])}, "set_offsets must begin at 0 and end at 7, not at 0 and 6"),
        ({"patient_offsets": torch.tensor([0, 2, 4])}, "patient_offsets must begin at 0 and end at 3, not at 0 and 4"),
    ],
)  # fmt: skip
def test_a_batch_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    batch = batch_of(make_patients([[1, 2], [4]]))
    with pytest.raises(ValueError, match=message):
        replace(batch, **change)
