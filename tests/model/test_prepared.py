"""The prepared batch: the same values in one buffer, moved by one copy."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.losses import LossCounts, LossOptions, compute_losses
from model.prepared import ALIGNMENT, PreparedBatch, _tensors
from tests.model.helpers import random_batch, tiny_model

SETS = [[1, 3, 2, 1, 9], [5], [2, 2, 12, 1, 1, 1, 4], [1], [11, 3]]


class Copies(TorchDispatchMode):
    """Notes the tensors that are copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.copied.append(args[-1] if func._overloadpacket is torch.ops.aten.copy_ else args[0])
        return func(*args, **(kwargs or {}))


def prepare(sets: list[list[int]], seed: int | None = 3) -> PreparedBatch:
    return PreparedBatch.build(random_batch(sets), seed=seed, step=2)


@pytest.mark.parametrize("sets", [SETS, [[1]], []])
@pytest.mark.parametrize("seed", [None, 3])
def test_packed_tensors_are_equal_and_lie_in_one_buffer(sets: list[list[int]], seed: int | None) -> None:
    prepared = prepare(sets, seed)
    packed = prepared.pack(pin=False)
    assert packed.buffer is not None
    storage = packed.buffer.untyped_storage().data_ptr()
    originals, views = _tensors(prepared), _tensors(packed)[:-1]  # the last is the buffer
    for original, view in zip(originals, views, strict=True):
        assert view.dtype == original.dtype
        assert torch.equal(view, original)
        assert view.untyped_storage().data_ptr() == storage
        assert view.storage_offset() * view.element_size() % ALIGNMENT == 0
    spans = sorted((v.storage_offset() * v.element_size(), v.nbytes) for v in views)
    assert all(start + size <= later for (start, size), (later, _) in itertools.pairwise(spans))
    assert packed.batch.patient_id == prepared.batch.patient_id
    assert packed.sets.classes == prepared.sets.classes


def test_a_packed_batch_is_moved_by_one_copy() -> None:
    packed = prepare(SETS).pack(pin=False)
    with Copies() as copies:
        moved = packed.to("meta", non_blocking=True)
    assert [tensor.nbytes for tensor in copies.copied] == [packed.buffer.nbytes]
    assert {tensor.device.type for tensor in _tensors(moved)} == {"meta"}
    assert [(t.shape, t.dtype) for t in _tensors(moved)] == [(t.shape, t.dtype) for t in _tensors(packed)]


def test_what_is_not_packed_is_moved_by_one_copy_too() -> None:
    with Copies() as copies:
        moved = prepare(SETS).to("meta")
    assert [tensor.device.type for tensor in copies.copied].count("meta") == 0
    assert moved.features.device.type == "meta"
    assert moved.to("meta") is moved


def test_packing_again_is_the_same() -> None:
    packed = prepare(SETS).pack(pin=False)
    again = packed.pack(pin=False)
    assert again.buffer.data_ptr() != packed.buffer.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(_tensors(again)[:-1], _tensors(packed)[:-1], strict=True))


def test_the_model_takes_a_packed_batch() -> None:
    model, prepared = tiny_model(), prepare(SETS)
    packed = prepared.pack(pin=False)
    assert torch.equal(model(packed).logits[0], model(prepared).logits[0])
    assert torch.equal(model.eval()(dataclasses.replace(packed, noise=None)).logits[0], model(prepared).logits[0])


def test_a_step_reads_and_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device reading a value would raise, and a tensor made on the host would be seen."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know "meta"
    model, moved = tiny_model().to("meta"), prepare(SETS).pack(pin=False).to("meta")
    counts = LossCounts(num_events=9, num_sets=4, num_labelled=(2,))
    with Copies() as copies:
        compute_losses(model(moved), moved.batch.label, LossOptions(), counts, beta=0.1).total.backward()
    assert not [tensor for tensor in copies.copied if tensor.device.type == "cpu"]
