"""Samples that share a patient's events: parts of a batch, and a batch without some events."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.prefixes import Prefixes
from pipeline.loading.batch import PatientBatch
from pipeline.loading.samples import BatchSamples
from tests.model.helpers import random_batch


def with_samples(sizes: list[list[int]], seed: int = 0) -> PatientBatch:
    """Each patient after each of its sets; labels count the samples."""
    batch = random_batch(sizes, seed=seed)
    counts = [list(range(1, 1 + len(sets))) for sets in sizes]
    patient = [number for number, of in enumerate(counts) for _ in of]
    samples = BatchSamples(
        patient=torch.tensor(patient, dtype=torch.int64),
        num_sets=torch.tensor([count for of in counts for count in of], dtype=torch.int64),
        label=torch.arange(len(patient)),
        prediction_time=[float(number) for number in range(len(patient))],
    )
    return PatientBatch(**{**vars(batch), "samples": samples})


def events_of(batch: PatientBatch) -> list[tuple[int, list[int], list[float]]]:
    """Label, codes and minutes of each sample."""
    assert batch.samples is not None
    alone = Prefixes(batch.samples.patient, batch.samples.num_sets).separate(batch)
    each = [alone.between(number, number + 1) for number in range(alone.num_patients)]
    labels = batch.samples.label.tolist()
    return [(label, one.code.tolist(), one.minute.tolist()) for label, one in zip(labels, each, strict=True)]


SIZES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5)


@given(SIZES, st.data())
def test_a_part_has_the_samples_of_its_patients(sizes: list[list[int]], data: st.DataObject) -> None:
    batch = with_samples(sizes)
    stop = data.draw(st.integers(0, len(sizes)))
    parts = [batch.between(0, stop), batch.between(stop, len(sizes))]
    assert [sample for part in parts for sample in events_of(part)] == events_of(batch)
    assert [time for part in parts for time in part.sample_names[1] or []] == batch.sample_names[1]
    assert [name for part in parts for name in part.sample_names[0]] == batch.sample_names[0]


@given(SIZES, st.integers(0, 99))
def test_events_that_are_dropped_are_dropped_from_every_sample(sizes: list[list[int]], seed: int) -> None:
    batch = with_samples(sizes, seed)
    keep = torch.rand(batch.num_events, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[batch.set_offsets[batch.patient_offsets[:-1]]] = True
    number = torch.arange(batch.num_events)
    numbered = PatientBatch(**{**vars(batch), "code": 1 + number})
    expected = [
        (label, [code for code in codes if keep[code - 1]], set(minutes))
        for label, codes, minutes in events_of(numbered)
    ]
    found = [(label, codes, set(minutes)) for label, codes, minutes in events_of(numbered.keep_events(keep))]
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert all(ours[2] <= theirs[2] for ours, theirs in zip(found, expected, strict=True))


def test_the_longest_sample_of_each_patient_and_pickles() -> None:
    batch = with_samples([[1, 2], [3], [1, 1, 1]])
    assert batch.samples is not None
    assert batch.samples.whole.tolist() == [1, 2, 5]
    assert (batch.num_samples, batch.num_patients) == (6, 3)
    again = pickle.loads(pickle.dumps(batch))
    assert events_of(again) == events_of(batch)
    assert events_of(batch.to("cpu")) == events_of(batch)
