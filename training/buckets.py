"""Gradients of several ranks, added up while the backward pass still goes on (Li et al. 2020, arXiv:2006.15704).

Gradients come in about the reverse order of the parameters.  In that order they are dealt to a few flat *buckets*, each
of which is sent as soon as its last gradient is there, so that most of the communication hides behind the arithmetic of
the parameters before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from training.parallel import World

MAX_BUCKET_BYTES = 25_000_000
"""A greater message gains no bandwidth, and the last one has nothing left to hide behind."""

MIN_BUCKET_BYTES = 1_000_000
"""A smaller message takes no less time."""

MIN_BUCKETS = 8
"""Buckets of a model that is large enough; of one that is not, buckets have at least ``MIN_BUCKET_BYTES``."""

ALIGNMENT = 4
"""Elements to which gradients are aligned in their bucket: an operation on lists of tensors takes four at a time."""


class GradientBuckets:
    """Adds up the gradients of a model over ranks, bucket by bucket.

    From the end of a step's backward pass to the next step gradients are views of the buckets, which are allocated
    once.  A bucket is filled by one operation when it is complete; were gradients views from the beginning, each would
    cost a launch of its own, to be added to zeros.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], world: World, *, min_bytes: int = MIN_BUCKET_BYTES):
        """Allocate the buckets, and listen to the gradients of all ``parameters`` that are trained.

        Those of all ranks must be alike, and on the ranks' devices.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self._world = world
        self._buckets = [_Bucket(dealt) for dealt in deal_parameters(trained, min_bytes)]
        self._missing: list[int] | None = None  # gradients that each bucket waits for; None = nobody listens
        self._sent: list[Any] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._count, number))

    def hold(self) -> None:
        """Send nothing until :meth:`begin`, also where a backward pass that had begun to send was given up."""
        self._missing = None

    def begin(self) -> None:
        """Send buckets from here on: the backward pass that follows is the last one of the step."""
        self._missing = [len(bucket.parameters) for bucket in self._buckets]

    def finish(self) -> None:
        """Send what is left, and wait until gradients are the sums over all ranks.

        A rank without patients, or with sets of one event alone, has no gradient of some parameters and adds nothing
        to theirs.  A parameter without a gradient on any rank has none after, as on a single device.
        """
        self._missing = None
        parameters = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        # Between hosts: to ask the device which gradients there are would be to wait for it.
        answer = dist.all_reduce(used, dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        while len(self._sent) < len(self._buckets):
            self._send_next()
        answer.wait()
        views = [view for bucket in self._buckets for view in bucket.views]
        for parameter, view, is_used in zip(parameters, views, used.tolist(), strict=True):
            parameter.grad = view if is_used else None
        for sent in self._sent:
            sent.wait()
        self._sent.clear()

    def _count(self, number: int, _: Tensor) -> None:
        """Note a gradient of bucket ``number``, and send what is complete, in the same order on every rank."""
        if self._missing is None:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[len(self._sent)]
        bucket.fill()
        self._sent.append(dist.all_reduce(bucket.flat, async_op=True))


class _Bucket:
    """One flat tensor [·] and the ``views`` of it that are the gradients of some ``parameters``."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [_aligned_size(parameter) for parameter in parameters]
        self.flat = parameters[0].new_zeros(sum(sizes), requires_grad=False)
        pieces = self.flat.split(sizes)
        self.views = [piece[: p.numel()].view_as(p) for piece, p in zip(pieces, parameters, strict=True)]

    @torch.no_grad()
    def fill(self) -> None:
        """Take the gradients, which become views; 0 where there is none."""
        pairs = list(zip(self.parameters, self.views, strict=True))
        empty = [view for parameter, view in pairs if parameter.grad is None]
        if empty:
            torch._foreach_zero_(empty)
        full = [(view, parameter.grad) for parameter, view in pairs if parameter.grad is not None]
        if full:
            torch._foreach_copy_([view for view, _ in full], [grad for _, grad in full])
        for parameter, view in pairs:
            if parameter.grad is not None:
                parameter.grad = view


def deal_parameters(parameters: Sequence[torch.nn.Parameter], min_bytes: int) -> list[list[torch.nn.Parameter]]:
    """Return parameters, in their order, in buckets of about equal size.

    A bucket ends before it would have more than an eighth of all bytes, or ``MAX_BUCKET_BYTES``, where it has
    ``min_bytes``; a parameter that is larger has a bucket alone.
    """
    total = sum(parameter.nbytes for parameter in parameters)
    limit = min(max(total / MIN_BUCKETS, min_bytes), MAX_BUCKET_BYTES)
    buckets: list[list[torch.nn.Parameter]] = []
    filled = limit
    for parameter in parameters:
        if filled + parameter.nbytes > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.nbytes
    return buckets


def _aligned_size(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
