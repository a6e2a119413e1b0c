"""Gradients of several ranks: when buckets are sent, what is left where a rank has no gradient, and the sum itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.losses import LossCounts, LossOptions
from pipeline import PatientBatch
from tests.model.helpers import random_batch, tiny_model
from tests.processes import Command
from tests.training.runs import rank_environments
from training.buckets import ALIGNMENT, GradientBuckets, deal_parameters
from training.data import BatchPreparer
from training.parallel import World, run
from training.schedule import OptimisationOptions
from training.state import build_state
from training.step import StepSettings, accumulate_gradients, step_numbers

TWO = World(0, 2, torch.device("cpu"))


class OtherRank:
    """Stands for PyTorch's all-reduce: adds what a second rank has, when the message is waited for."""

    def __init__(self, *, has_gradients: bool, value: float) -> None:
        self._has_gradients, self._value = has_gradients, value
        self.sent: list[Tensor] = []
        self.waited = 0

    def __call__(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, *, group: Any = None, async_op: bool) -> Any:
        assert async_op
        if tensor.dtype == torch.uint8:
            assert op == dist.ReduceOp.MAX
            tensor.clamp_(min=int(self._has_gradients))
        else:
            self.sent.append(tensor)
        return self

    def wait(self) -> None:
        if self.waited == 0:
            for tensor in self.sent:
                tensor += self._value
        self.waited += 1


def layers(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    model(x).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("sizes", "min_bytes", "expected"),
    [
        ([10, 10, 10], 0, [[10], [10], [10]]),  # an eighth of all is less than any
        ([10] * 16, 0, [[10, 10]] * 8),
        ([10] * 16, 320, [[10] * 8] * 2),
        ([4, 4, 90, 4, 4], 40, [[4, 4], [90], [4, 4]]),  # what is larger than a bucket has one alone
        ([7_000_000, 6_000_000, 100], 10**9, [[7_000_000], [6_000_000, 100]]),  # 25 MB at most
        ([], 0, []),
    ],
)
def test_parameters_are_dealt_in_their_order(sizes: list[int], min_bytes: int, expected: list[list[int]]) -> None:
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    dealt = deal_parameters(parameters, min_bytes)
    assert [[parameter.numel() for parameter in bucket] for bucket in dealt] == expected
    assert [id(p) for bucket in dealt for p in bucket] == [id(p) for p in parameters]


def test_buckets_are_sent_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layers(3, 5, 7, 2), torch.randn(4, 3)
    expected, events = gradients(model, x), list[str]()
    other = OtherRank(has_gradients=True, value=0.5)
    monkeypatch.setattr(dist, "all_reduce", other)
    buckets = GradientBuckets(model.parameters(), TWO, min_bytes=0)
    for parameter, name in zip(model.parameters(), "abc", strict=True):  # called after the buckets' own
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(f"{name}{len(other.sent)}"))
    buckets.begin()
    model(x).sum().backward()
    assert events == ["c1", "b2", "a3"], "each bucket has left before the next gradient comes"
    buckets.finish()
    assert other.waited == 1 + 3
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert grad is not None
        torch.testing.assert_close(parameter.grad, grad + 0.5, rtol=0, atol=0)
        assert parameter.grad.storage_offset() % ALIGNMENT == 0


def test_buckets_are_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(3, 5, 2)
    monkeypatch.setattr(dist, "all_reduce", OtherRank(has_gradients=True, value=0.0))
    buckets, places = GradientBuckets(model.parameters(), TWO), list[list[int]]()
    for step in range(3):
        model.zero_grad()
        buckets.begin()
        model(torch.full((1, 3), float(step))).sum().backward()
        buckets.finish()
        places.append([parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None])
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 2


def test_only_the_last_part_of_a_batch_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, parts = layers(3, 5, 2), torch.randn(2, 4, 3)
    expected = gradients(model, parts.flatten(0, 1))
    other = OtherRank(has_gradients=True, value=0.0)
    monkeypatch.setattr(dist, "all_reduce", other)
    buckets = GradientBuckets(model.parameters(), TWO, min_bytes=0)
    model(parts[0]).sum().backward()
    assert not other.sent
    buckets.begin()
    model(parts[1]).sum().backward()
    buckets.finish()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_a_pass_that_was_given_up_and_taken_again_in_parts_gives_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ended when the last layer's bucket had been sent: it was complete, and the parts that follow add up."""
    model, parts = layers(3, 5, 7, 2), torch.randn(2, 4, 3)
    expected, other = gradients(model, parts.flatten(0, 1)), OtherRank(has_gradients=True, value=0.5)
    monkeypatch.setattr(dist, "all_reduce", other)
    buckets = GradientBuckets(model.parameters(), TWO, min_bytes=0)
    buckets.hold()
    buckets.begin()
    hidden = model[:2](parts.flatten(0, 1))
    model[2](hidden.detach()).sum().backward()
    assert len(other.sent) == 1
    model.zero_grad()
    buckets.hold()
    model(parts[0]).sum().backward()
    assert len(other.sent) == 1, "nothing that has but a part of the batch"
    buckets.begin()
    model(parts[1]).sum().backward()
    buckets.finish()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert grad is not None
        torch.testing.assert_close(parameter.grad, grad + 0.5)


@pytest.mark.parametrize("other_has", [True, False])
def test_a_parameter_without_a_gradient(other_has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All buckets are sent; what no rank has a gradient of keeps none, also where the bucket holds the last step's."""
    model, x = layers(3, 5, 2), torch.randn(4, 3)
    other = OtherRank(has_gradients=other_has, value=0.0)
    monkeypatch.setattr(dist, "all_reduce", other)
    buckets = GradientBuckets(model.parameters(), TWO, min_bytes=0)
    for module in (model, model[0]):  # in the second step the last layer is not used
        model.zero_grad()
        other.sent.clear()
        buckets.begin()
        module(x).sum().backward()
        buckets.finish()
        assert len(other.sent) == 2
    assert model[0].weight.grad is not None
    grad = model[1].weight.grad
    assert (grad is not None and not grad.any()) if other_has else grad is None


def test_one_device_has_no_hooks() -> None:
    model = tiny_model()
    build_state(model, Any, OptimisationOptions())
    assert all(parameter._post_accumulate_grad_hooks is None for parameter in model.parameters())


SHARES: list[tuple[list[list[int]], list[list[int]]]] = [
    ([[3, 1], [5]], [[2, 4], [4]]),
    ([[3, 1], [5]], []),  # more ranks than patients
    ([[1, 1, 1]], [[1]]),  # sets of one event: no parameter of the attention within sets has a gradient
    ([[1, 1, 1]], [[2, 2]]),
]


def sums_are_sums(_: Sequence[str]) -> int:
    """Take two parts a step on this rank; 1 where a gradient is not, to the bit, the sum of those of both ranks."""

    def worker(world: World) -> int:
        model, options = tiny_model(dropout=0.2), OptimisationOptions()
        state, failures = build_state(model, Any, options), 0
        buckets = GradientBuckets(model.parameters(), world, min_bytes=0)
        for step, shares in enumerate(SHARES):
            batch = random_batch(shares[world.rank], seed=world.rank)
            parts = [prepare(part, step) for part in halves(batch)]
            alone = StepSettings(LossOptions(), options, world, 9, BatchPreparer(seed=1))
            both = StepSettings(LossOptions(), options, world, 9, BatchPreparer(seed=1), buckets=buckets)
            numbers, found = step_numbers(state, LossCounts.one(1), alone), list[list[Tensor | None]]()
            for settings in (alone, both):
                model.zero_grad()
                accumulate_gradients(parts, numbers, state, settings)
                if settings is both:
                    buckets.finish()
                found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            own, summed = found
            for mine, theirs, total in zip(*world.gather(own), summed, strict=True):
                terms = [grad for grad in (mine, theirs) if grad is not None]
                failures += (total is None) != (not terms)
                failures += total is not None and not torch.equal(total, sum(terms, torch.zeros(())))
        return int(failures > 0)

    return run(worker, devices=1, device="cpu")


def prepare(batch: PatientBatch, step: int) -> Any:
    return BatchPreparer(seed=1).prepare(batch, step)


def halves(batch: PatientBatch) -> list[PatientBatch]:
    if batch.num_patients < 2:
        return [batch]
    return [batch.between(0, 1), batch.between(1, batch.num_patients)]


def test_two_ranks_have_the_sum_of_their_gradients() -> None:
    ranks = [Command(sums_are_sums, **environment) for environment in rank_environments(2)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
