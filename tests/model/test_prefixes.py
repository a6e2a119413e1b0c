"""Samples that share passes: outputs and gradients are those of separate windows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import Outcome
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from tests.model.helpers import first_hours, random_batch, tiny_model

WARD = Outcome(name="ward", kind="multiclass", classes=("a", "b", "c"))


@st.composite
def batches_with_prefixes(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int]]]:
    sizes = draw(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=1, max_size=4))
    sample = st.integers(0, len(sizes) - 1).flatmap(
        lambda patient: st.tuples(st.just(patient), st.integers(1, len(sizes[patient])))
    )
    return sizes, draw(st.lists(sample, min_size=1, max_size=8))


def logits_and_gradients(model: SeqSetVAE, prepared: PreparedBatch) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(prepared, reconstruct=False).logits
    weights = torch.arange(1, 1 + len(logits[0]))[:, None, None]
    sum((each.square() * weights).sum() for each in logits).backward()
    of_model = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*(each.detach() for each in logits), *of_model]


def assert_agree(shared: list[torch.Tensor], separate: list[torch.Tensor]) -> None:
    for ours, theirs in zip(shared, separate, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@given(batches_with_prefixes(), st.sampled_from([None, 7]))
@settings(max_examples=30, deadline=None)
def test_shared_passes_are_separate_windows(case: tuple, seed: int | None) -> None:
    sizes, samples = case
    batch, prefixes = random_batch(sizes), Prefixes(*torch.tensor(samples).T.contiguous())
    model = tiny_model(outcomes=(Outcome(), WARD)).train(seed is not None)
    shared = PreparedBatch.build(batch, prefixes=prefixes, seed=seed, step=3)
    separate = PreparedBatch.build(prefixes.separate(batch), seed=seed, step=3)
    assert_agree(logits_and_gradients(model, shared), logits_and_gradients(model, separate))


@pytest.mark.parametrize("changes", [{"variable_axis": False}, {"without": "summary_features"}, {"num_codes": 300}])
def test_other_heads(changes: dict) -> None:
    batch, model = random_batch([[3, 1, 2, 4], [2]]), tiny_model(**changes).eval()
    prefixes = Prefixes(torch.tensor([1, 0, 0]), torch.tensor([1, 2, 4]))
    shared, separate = PreparedBatch.build(batch, prefixes=prefixes), PreparedBatch.build(prefixes.separate(batch))
    assert_agree(logits_and_gradients(model, shared), logits_and_gradients(model, separate))


def test_separate_by_hand() -> None:
    """Of patients with sets of 2, 1 and of 3 events: the first set of the first, the second whole, the first whole."""
    batch = random_batch([[2, 1], [3]])
    separate = Prefixes(torch.tensor([0, 1, 0]), torch.tensor([1, 1, 2])).separate(batch)
    assert torch.equal(separate.code, batch.code[[0, 1, 3, 4, 5, 0, 1, 2]])
    assert separate.set_sizes.tolist() == [2, 3, 2, 1]
    assert separate.sets_per_patient.tolist() == [1, 1, 2]
    assert separate.patient_id == ["p0", "p1", "p0"]
    assert separate.label.tolist() == [0, 1, 0]
    assert torch.equal(separate.minute, batch.minute[[0, 2, 0, 1]])


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_hours_are_those_of_the_events_until_then(sizes: list[list[int]], seed: int) -> None:
    batch, hours = random_batch(sizes, seed=seed), (0.0, 6.0, 30.0)
    separate = Prefixes.after_hours(batch, hours).separate(batch)
    parts = [batch, *(first_hours(batch, each) for each in hours)]
    for name in ("code", "value", "minute"):
        assert torch.equal(getattr(separate, name), torch.cat([getattr(part, name) for part in parts]))
    assert separate.sets_per_patient.tolist() == torch.cat([part.sets_per_patient for part in parts]).tolist()


def test_first_hours_count_from_the_first_set() -> None:
    """Sets at minutes 60, 420 and 421 of one patient, at 0 of another: six hours end with minute 420."""
    batch = random_batch([[2, 1, 1], [1]])
    batch.minute[:] = torch.tensor([60.0, 420.0, 421.0, 0.0])
    prefixes = Prefixes.after_hours(batch, (6.0,))
    early = prefixes.separate(batch).between(batch.num_patients, 2 * batch.num_patients)
    assert torch.equal(early.code, batch.code[[0, 1, 2, 4]])
    assert early.minute.tolist() == [60.0, 420.0, 0.0]
    assert early.patient_offsets.tolist() == [0, 2, 3]


def test_hours_end_before_the_first_set_that_is_later() -> None:
    """A set that overlaps comes after a later one: it is not seen before that."""
    batch = random_batch([[1, 1, 1], [1]])
    batch.minute[:3] = torch.tensor([0.0, 500.0, 100.0])
    assert Prefixes.after_hours(batch, (6.0,)).num_sets.tolist() == [3, 1, 1, 1]


def test_no_patients() -> None:
    batch = random_batch([[1]]).between(0, 0)
    prefixes = Prefixes.after_hours(batch, (6.0, 12.0))
    output = tiny_model().eval()(PreparedBatch.build(batch, prefixes=prefixes))
    assert output.predictions[0].shape == (0, 2)
