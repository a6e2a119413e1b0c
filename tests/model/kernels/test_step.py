"""The model with its kernels is the model with their references: outputs, losses and gradients of a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.attention import ISAB
from model.capacity import BatchShape
from model.kernels.ops import choose_kernels
from model.losses import LossCounts, LossOptions, compute_losses
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from pipeline import PatientBatch
from tests.model.helpers import NUM_CODES, random_batch, tiny_model


def results(
    batch: PatientBatch, num_codes: int, *, checkpointed: bool = False, capacities: Sequence[BatchShape] = ()
) -> dict[str, Tensor]:
    model = tiny_model(dropout=0.2, num_codes=num_codes).train()
    model.gradient_checkpointing = checkpointed
    prepared = PreparedBatch.build(batch, seed=1, step=2, capacities=capacities)
    assert (prepared.shape in capacities) or not capacities
    output = model(prepared)
    counts = LossCounts(num_events=batch.num_events, num_sets=batch.num_sets, num_labelled=(batch.num_patients,))
    losses = compute_losses(output, prepared.batch.label, LossOptions(), counts, beta=0.1)
    losses.total.backward()
    assert output.decoded is not None
    assert output.logits is not None
    found = {"loss": losses.total, "logits": output.logits[0], "context": output.context}
    found["decoded"] = output.decoded[prepared.sets.mask]
    found |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("sets", "num_codes", "checkpointed"),
    [
        ([[3, 4, 1], [5, 17], [16, 15]], NUM_CODES, False),
        ([[7]], NUM_CODES, False),
        ([[1], [1, 1]], NUM_CODES, True),
        ([[3, 1], [2]], 1000, True),
        ([], NUM_CODES, False),
    ],
    ids=["corners", "one patient", "single events", "many codes", "no patient"],
)
def test_outputs_and_gradients(sets: list[list[int]], num_codes: int, checkpointed: bool) -> None:
    batch = random_batch(sets)
    found = results(batch, num_codes, checkpointed=checkpointed)
    with choose_kernels(False):
        expected = results(batch, num_codes)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5 * largest + 1e-7, msg=name)


@pytest.mark.parametrize(("reconstruct", "classify"), [(False, False), (True, False), (False, True)])
def test_parts_that_do_not_run_have_no_gradients(reconstruct: bool, classify: bool) -> None:
    """Though the projections of all blocks that run are folded at once."""
    model, batch = tiny_model().eval(), random_batch([[3, 4, 1], [5]])
    output = model(PreparedBatch.build(batch), reconstruct=reconstruct, classify=classify)
    with choose_kernels(False):
        expected = model(PreparedBatch.build(batch), reconstruct=reconstruct, classify=classify)
    torch.testing.assert_close(output.context, expected.context, rtol=0, atol=1e-5)
    tensors = (output.context, output.decoded, *(output.logits or ()))
    torch.stack([of.sum() for of in tensors if of is not None]).sum().backward()
    for part, runs in ((model.encoder, True), (model.decoder, reconstruct), (model.head, classify)):
        blocks = [module for module in part.modules() if isinstance(module, ISAB)]
        assert blocks
        assert all((parameter.grad is not None) == runs for block in blocks for parameter in block.parameters())


def test_fillers_weigh_nothing() -> None:
    """The shapes of a capacity, with tiles that lie behind every set and patient, change no loss and no gradient."""
    batch = random_batch([[3, 4, 1], [5, 17], [16, 15]])
    room = BatchShape(
        events=60, single_sets=3, sets=6, single_patients=1, patients=3, pairs=14, codes=NUM_CODES - 1, longest=40
    )
    own = dataclasses.asdict(BatchShape.of(batch))
    capacity = dataclasses.replace(room, **{n: own[n] + getattr(room, n) for n in own if n not in ("codes", "longest")})
    found = results(batch, NUM_CODES, capacities=[capacity])
    with choose_kernels(False):
        expected = results(batch, NUM_CODES)
    for name in expected:
        rows = len(expected[name]) if name in ("context", "logits") else None  # fillers come last
        if name != "decoded":
            largest = float(expected[name].abs().max())
            torch.testing.assert_close(
                found[name][:rows] if rows else found[name],
                expected[name],
                rtol=0,
                atol=2e-5 * largest + 1e-7,
                msg=name,
            )


def test_samples_share_passes() -> None:
    batch, model = random_batch([[3, 1, 2, 4], [2]]), tiny_model().eval()
    prefixes = Prefixes(torch.tensor([1, 0, 0]), torch.tensor([1, 2, 4]))

    def gradients(prepared: PreparedBatch) -> list[Tensor]:
        model.zero_grad()
        output = model(prepared, reconstruct=False)
        assert output.logits is not None
        (output.logits[0].square() * torch.arange(1, 4)[:, None, None]).sum().backward()
        return [output.logits[0].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    found = gradients(PreparedBatch.build(batch, prefixes=prefixes))
    with choose_kernels(False):
        expected = gradients(PreparedBatch.build(prefixes.separate(batch)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
