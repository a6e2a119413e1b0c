"""The whole model: against the naive reference, and the invariances that docs/model.md promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.losses import LossCounts, LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from tests.model import reference
from tests.model.helpers import NUM_CODES, counts_of, random_batch, run_model, select, tiny_model

SETS = [[1, 3, 2, 1, 9], [5], [2, 2, 12, 1, 1, 1, 4], [1], [11, 3]]
OPTIONS = LossOptions()


def gradients(model: SeqSetVAE, batch: PatientBatch, counts: LossCounts, seed: int | None = None) -> torch.Tensor:
    model.zero_grad()
    loss = compute_losses(run_model(model, batch, seed), batch.label, OPTIONS, counts, beta=0.1)
    loss.total.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("event_form", "variable_axis", "num_codes"),
    [("additive", True, NUM_CODES), ("product", False, NUM_CODES), ("product", True, 1000), ("additive", False, 1000)],
)
def test_agrees_with_the_naive_reference(event_form: str, variable_axis: bool, num_codes: int) -> None:
    model, batch = (
        tiny_model(event_form=event_form, variable_axis=variable_axis, num_codes=num_codes),
        random_batch(SETS, labels=[1, -1, 0, 1, -1]),
    )
    output = run_model(model, batch)
    first = 0
    for b in range(batch.num_patients):
        expected = reference.patient(model, batch, b)
        own = slice(first, first + len(SETS[b]))
        first += len(SETS[b])
        torch.testing.assert_close(output.posterior.mu[own], expected.mu, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.posterior.logvar[own], expected.logvar, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.context[own], expected.context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.logits[0][b], expected.logits, atol=1e-5, rtol=1e-5)
    found = compute_losses(output, batch.label, OPTIONS, counts_of(batch), beta=0.07).total
    torch.testing.assert_close(found, reference.total_loss(model, batch, OPTIONS, 0.07), atol=1e-5, rtol=1e-5)


def test_gradient_agrees_with_the_naive_reference() -> None:
    model, batch = tiny_model(), random_batch(SETS)
    found = gradients(model, batch, counts_of(batch))
    model.zero_grad()
    reference.total_loss(model, batch, OPTIONS, 0.1).backward()
    expected = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("order", [[2, 0, 4, 3, 1], [4, 3, 2, 1, 0]])
def test_a_patient_is_the_same_alone_and_in_any_batch(seed: int | None, order: list[int]) -> None:
    """With noise too: a patient's noise is its own."""
    model, batch = tiny_model(), random_batch(SETS)
    together = run_model(model, select(batch, order), seed, step=5)
    for position, b in enumerate(order):
        alone = run_model(model, select(batch, [b]), seed, step=5)
        first = sum(len(SETS[other]) for other in order[:position])
        own = slice(first, first + len(SETS[b]))
        torch.testing.assert_close(together.logits[0][position : position + 1], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.context[own], alone.context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.posterior.mu[own], alone.posterior.mu, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [None, 7])
def test_losses_and_gradients_of_parts_add_up_to_the_whole(seed: int | None) -> None:
    """What several ranks hold of a global batch sums to what one device has."""
    model, batch = tiny_model(), random_batch(SETS, labels=[0, 1, -1, 1, 0])
    counts = counts_of(batch)
    whole = gradients(model, batch, counts, seed)
    parts = [gradients(model, select(batch, some), counts, seed) for some in ([3], [0, 4], [2, 1])]
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pad_to", [None, 40, 77])
def test_padding_changes_nothing(pad_to: int | None) -> None:
    model, batch = tiny_model(), random_batch(SETS)
    unpadded = PatientBatch.from_padded(batch.to_padded(pad_to=pad_to), batch.patient_id)
    torch.testing.assert_close(
        run_model(model, unpadded).logits[0], run_model(model, batch).logits[0], atol=1e-5, rtol=1e-5
    )
    counts = counts_of(batch)
    torch.testing.assert_close(
        gradients(model, unpadded, counts), gradients(model, batch, counts), atol=1e-5, rtol=1e-4
    )


def test_no_set_sees_a_later_set_or_another_patient() -> None:
    model, batch = tiny_model(), random_batch(SETS)
    before = run_model(model, batch).context
    for b in range(batch.num_patients):
        for s in range(int(batch.patient_offsets[b]), int(batch.patient_offsets[b + 1])):
            changed_value = batch.value.clone()
            events = slice(int(batch.set_offsets[s]), int(batch.set_offsets[s + 1]))
            changed_value[events] += 3.0
            changed_code = batch.code.clone()
            changed_code[events] = changed_code[events] % 7 + 2
            has_value = batch.has_value.clone()
            has_value[events] = True
            changed = dataclasses.replace(batch, value=changed_value, code=changed_code, has_value=has_value)
            difference = (run_model(model, changed).context - before).abs().amax(1)
            last = int(batch.patient_offsets[b + 1])
            untouched = [i for i in range(batch.num_sets) if i < s or i >= last]
            assert difference[s] > 1e-4, "the set itself must change, or the test shows nothing"
            assert last - s == 1 or difference[s + 1 : last].min() > 1e-6
            assert not untouched or difference[untouched].max() < 1e-6


def test_order_of_events_inside_a_set_does_not_matter() -> None:
    model, batch = tiny_model(), random_batch(SETS)
    generator = torch.Generator().manual_seed(1)
    pieces = []
    for s in range(batch.num_sets):
        start, stop = int(batch.set_offsets[s]), int(batch.set_offsets[s + 1])
        pieces.append(start + torch.randperm(stop - start, generator=generator))
    order = torch.cat(pieces)
    assert not torch.equal(order, torch.arange(batch.num_events))
    shuffled = dataclasses.replace(
        batch, code=batch.code[order], value=batch.value[order], has_value=batch.has_value[order]
    )
    counts = counts_of(batch)
    torch.testing.assert_close(
        run_model(model, shuffled).logits[0], run_model(model, batch).logits[0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        gradients(model, shuffled, counts), gradients(model, batch, counts), atol=1e-5, rtol=1e-4
    )


def test_an_unlabelled_patient_does_not_teach_the_head() -> None:
    model, batch = tiny_model(), random_batch(SETS, labels=[-1] * 5)
    counts = counts_of(batch)
    gradients(model, batch, counts)
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.head.parameters())
    assert torch.isfinite(compute_losses(run_model(model, batch), batch.label, OPTIONS, counts, beta=0.1).total)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 3])
def test_gradient_checkpointing_gives_the_same_gradient_bit_for_bit(seed: int | None, precision: torch.dtype) -> None:
    """With a seed, samples and dropout have to be the same again."""
    model, batch = tiny_model(), random_batch(SETS)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        kept = gradients(model, batch, counts_of(batch), seed)
        model.gradient_checkpointing = True
        assert torch.equal(gradients(model, batch, counts_of(batch), seed), kept)


def test_gradient_checkpointing_keeps_less() -> None:
    """Bytes kept for the backward pass, of every storage once; weights and inputs are there anyway."""

    def kept_bytes(checkpointed: bool) -> int:
        model, batch = tiny_model(), random_batch(SETS)
        model.gradient_checkpointing = checkpointed
        given = PreparedBatch.build(batch, seed=1)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(given)
            loss = compute_losses(output, batch.label, OPTIONS, counts_of(batch), beta=0.1)
        assert loss.total.requires_grad
        return sum(storages.values())

    assert kept_bytes(True) < kept_bytes(False) / 2


def test_noise_changes_with_the_step_and_the_seed() -> None:
    model, batch = tiny_model(), random_batch(SETS)
    logits = [run_model(model, batch, seed, step).logits[0] for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[3])


def test_no_patients_at_all() -> None:
    """A rank that got nothing of the last batch still takes part."""
    model = tiny_model()
    batch = random_batch([])
    output = run_model(model, batch, seed=0)
    assert [logits.shape for logits in output.logits] == [(0, 8, 2)]
    loss = compute_losses(
        output, batch.label, OPTIONS, LossCounts(num_events=5, num_sets=2, num_labelled=(1,)), beta=0.1
    )
    loss.total.backward()
    assert loss.total.item() == 0.0


def test_a_plain_batch_is_prepared_for_evaluation() -> None:
    model, batch = tiny_model().eval(), random_batch(SETS)
    assert torch.equal(model(batch).probability, model(PreparedBatch.build(batch)).probability)


def test_training_mode_decides_about_noise() -> None:
    """In evaluation the noise of a prepared batch is not looked at; training without noise is refused."""
    model, batch = tiny_model(), random_batch(SETS)
    noisy = PreparedBatch.build(batch, seed=0)
    trained = model.train()(noisy).logits[0]
    assert torch.equal(model.eval()(noisy).logits[0], model(batch).logits[0])
    assert not torch.allclose(trained, model(batch).logits[0])
    for without in (batch, PreparedBatch.build(batch)):
        with pytest.raises(ValueError, match=r"prepare the batch with a seed, or call model\.eval"):
            model.train()(without)


def test_extreme_values_stay_finite() -> None:
    model, batch = tiny_model(), random_batch(SETS)
    extreme = dataclasses.replace(batch, value=batch.value * 1e30, minute=batch.minute * 1e6 - 1e8)
    assert torch.isfinite(run_model(model, extreme).logits[0]).all()
