"""Training steps as CUDA graphs, one a capacity: a step is then one launch (``--cuda_graphs``).

The first batch of a capacity runs as any other, which compiles its kernels; at the second the step is captured, from
zeroed gradients to averaged weights, and from then on it is replayed.  What changes from step to step, the batch, the
learning rate, the counts of the losses, beta and the decay of the EMA, is read from memory of the graph's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.capacity import BatchShape
from model.losses import LossCounts, Losses
from model.prepared import PreparedBatch

Outputs = TypeVar("Outputs")

Step = Callable[[PreparedBatch, "StepNumbers"], tuple[Losses, Tensor]]
"""Makes a step of a batch on the device; returns the losses and the norm of the gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNumbers:
    """What changes a step besides state and batch; in a captured graph scalars on the device.

    Attributes:
        counts: of the global batch.
        beta: weight of the KL divergence.
        ema_decay: of the averaged weights.
        learning_rates: of the groups of parameters.
    """

    counts: LossCounts
    beta: float | Tensor
    ema_decay: float | Tensor
    learning_rates: list[float] | list[Tensor]

    def flatten(self) -> list[float]:
        counts = (self.counts.num_events, self.counts.num_sets, *self.counts.num_labelled)
        return [float(x) for x in (self.beta, self.ema_decay, *counts, *self.learning_rates)]

    def take(self, numbers: Tensor) -> StepNumbers:
        """Return scalars that are views of ``numbers`` [·] float32, in the order of :meth:`flatten`."""
        beta, ema_decay, events, sets, *others = numbers.unbind()
        tasks = len(self.counts.num_labelled)
        counts = LossCounts(num_events=events, num_sets=sets, num_labelled=tuple(others[:tasks]))
        return StepNumbers(counts=counts, beta=beta, ema_decay=ema_decay, learning_rates=others[tasks:])


def capture_cuda(run: Callable[[], Outputs], pool: Any) -> tuple[Callable[[], None], Outputs]:
    """Capture ``run``; return what replays it and the outputs, which each replay writes anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()
    return graph.replay, outputs


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Callable[[], None]
    buffer: Tensor
    numbers: Tensor
    outputs: tuple[Losses, Tensor]


@dataclass
class StepGraphs:
    """The captured steps of a run.

    Attributes:
        device: where steps run.
        capture: :func:`capture_cuda`, or what stands for it in a test.
        replayed: number of steps that ran as graphs.
    """

    device: torch.device
    capture: Callable[..., tuple[Callable[[], None], tuple[Losses, Tensor]]] = capture_cuda
    replayed: int = 0
    _captured: dict[BatchShape, _Captured | None] = field(default_factory=dict)
    _pool: Any = None

    def run(self, prepared: PreparedBatch, numbers: StepNumbers, step: Step) -> tuple[Losses, Tensor] | None:
        """Replay the step of a packed batch; return its losses and the norm of its gradient, until the next replay.

        The result is None where the batch has no capacity, or is the first of one: then the caller makes the step.
        """
        shape = prepared.shape
        if shape is None or prepared.buffer is None:
            return None
        if shape not in self._captured:
            self._captured[shape] = None
            return None
        captured = self._captured[shape] or self._capture(prepared, numbers, step)
        self._captured[shape] = captured
        flat = torch.tensor(numbers.flatten(), dtype=torch.float32, pin_memory=self.device.type == "cuda")
        captured.numbers.copy_(flat, non_blocking=True)
        captured.buffer.copy_(prepared.buffer, non_blocking=True)
        captured.replay()
        self.replayed += 1
        return captured.outputs

    def _capture(self, prepared: PreparedBatch, numbers: StepNumbers, step: Step) -> _Captured:
        assert prepared.buffer is not None
        if self._pool is None and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()  # no two graphs run at once, so they may share their memory
        buffer = torch.empty_like(prepared.buffer, device=self.device).copy_(prepared.buffer)
        own = torch.empty(len(numbers.flatten()), device=self.device)
        batch, scalars = prepared.take(buffer), numbers.take(own)
        replay, outputs = self.capture(lambda: step(batch, scalars), self._pool)
        return _Captured(replay, buffer, own, outputs)
