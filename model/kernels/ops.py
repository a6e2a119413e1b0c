"""The kernels as operations of PyTorch, which autograd, autocast, ``meta`` and checkpointing know.

Each runs one function of this package, whose docstring describes it, and imports Triton when it is first called with
data.  On ``meta`` they make shapes alone, so that a step can be counted where there is no GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

TILE = 16
"""Slots that a program takes at a time: the fewest rows of a product of a GPU's matrix units."""

SEQUENCE_TILE = 32
"""Sets that a program of the causal attention takes at a time."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_chosen: ContextVar[bool | None] = ContextVar("_chosen", default=None)


@contextlib.contextmanager
def choose_kernels(chosen: bool) -> Iterator[None]:
    """Run kernels, on the CPU in Triton's interpreter, or their references in plain PyTorch, on whatever device."""
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


def uses_kernels(device: torch.device) -> bool:
    """Return whether the model runs its kernels on ``device``: on a GPU, and on ``meta``, where they are shapes."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return device.type == "meta" or (device.type == "cuda" and _HAS_TRITON)


def _define(function: str, schema: str, fake: Callable[..., Any]) -> Any:
    module, name = function.split(".")

    def call(*arguments: Any) -> Any:
        dense = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]  # kernels know of no strides
        return getattr(importlib.import_module(f"model.kernels.{module}"), name)(*dense)

    operation = torch.library.custom_op(f"seqsetvae::{name}", call, mutates_args=(), schema=schema)
    operation.register_fake(fake)
    return operation


gather = _define(
    "attention.gather",
    "(Tensor projected, Tensor[] sets, int heads, int points, int num_rows, float scale) -> (Tensor, Tensor)",
    lambda projected, sets, heads, points, num_rows, scale: (
        projected.new_empty(num_rows, projected.shape[1] // heads - points),
        projected.new_empty(len(sets[1]), heads, points, dtype=torch.float32),
    ),
)
_gather_gradient = _define(
    "attention.gather_gradient",
    "(Tensor grad_out, Tensor projected, Tensor[] sets, Tensor log_sums, float scale) -> Tensor",
    lambda grad_out, projected, *rest: torch.empty_like(projected),
)
scatter = _define(
    "attention.scatter",
    "(Tensor queries, Tensor keys, Tensor[] sets, int heads, int points, float scale) -> Tensor",
    lambda queries, *rest: torch.empty_like(queries),
)
_scatter_gradients = _define(
    "attention.scatter_gradients",
    "(Tensor grad_out, Tensor queries, Tensor keys, Tensor[] sets, int heads, int points, float scale) "
    "-> (Tensor, Tensor)",
    lambda grad_out, queries, keys, *rest: (torch.empty_like(queries), torch.empty_like(keys)),
)
pool = _define(
    "pooling.pool",
    "(Tensor values, Tensor scores, Tensor? order, Tensor offsets) -> (Tensor, Tensor)",
    lambda values, scores, order, offsets: (
        values.new_empty(len(offsets) - 1, values.shape[1], dtype=torch.float32),
        values.new_empty(len(offsets) - 1, scores.shape[1], dtype=torch.float32),
    ),
)
_pool_gradients = _define(
    "pooling.pool_gradients",
    "(Tensor grad_out, Tensor values, Tensor scores, Tensor? order, Tensor offsets, Tensor out, Tensor log_sums) "
    "-> (Tensor, Tensor)",
    lambda grad_out, values, scores, *rest: (torch.empty_like(values), torch.empty_like(scores)),
)
chamfer = _define(
    "chamfer.chamfer",
    "(Tensor target, Tensor output, Tensor[] tiles, float min_norm) -> (Tensor, Tensor)",
    lambda target, *rest: (
        target.new_empty(3, dtype=torch.float32),
        target.new_empty(6, len(target), dtype=torch.int32),
    ),
)
_chamfer_gradient = _define(
    "chamfer.chamfer_gradient",
    "(Tensor grad, Tensor target, Tensor output, Tensor[] tiles, Tensor nearest, float min_norm) -> Tensor",
    lambda grad, target, output, *rest: torch.empty_like(output),
)
causal = _define(
    "causal.causal",
    "(Tensor qkv, Tensor tile_patient, Tensor tile_begin, Tensor offsets) -> (Tensor, Tensor)",
    lambda qkv, *rest: (
        qkv.new_empty(len(qkv), *qkv.shape[2:]),
        qkv.new_empty(len(qkv), qkv.shape[2], dtype=torch.float32),
    ),
)
_causal_gradient = _define(
    "causal.causal_gradient",
    "(Tensor grad_out, Tensor qkv, Tensor tile_patient, Tensor tile_begin, Tensor offsets, Tensor out, "
    "Tensor log_sums) -> Tensor",
    lambda grad_out, qkv, *rest: torch.empty_like(qkv),
)
sum_segments = _define(
    "rows.sum_segments",
    "(Tensor rows, Tensor? order, Tensor offsets, int num_segments) -> Tensor",
    lambda rows, order, offsets, num_segments: rows.new_empty(num_segments, *rows.shape[1:]),
)
divergence = _define(
    "posterior.divergence",
    "(Tensor mu, Tensor logvar, Tensor num_sets, float free_bits) -> Tensor",
    lambda mu, *rest: mu.new_empty(()),
)
_divergence_gradients = _define(
    "posterior.divergence_gradients",
    "(Tensor grad, Tensor mu, Tensor logvar, Tensor num_sets, float free_bits) -> (Tensor, Tensor)",
    lambda grad, mu, *rest: (torch.empty(mu.shape, device=mu.device), torch.empty(mu.shape, device=mu.device)),
)
add_norm = _define(
    "norms.add_norm",
    "(Tensor x, Tensor y, Tensor gain, Tensor shift, float eps) -> (Tensor, Tensor)",
    lambda x, *rest: (
        x.new_empty(x.shape, dtype=torch.float32),
        x.new_empty(2, len(x), dtype=torch.float32),
    ),
)
add_norm_gradients = _define(
    "norms.add_norm_gradients",
    "(Tensor grad, Tensor? more, Tensor x, Tensor y, Tensor gain, Tensor stats) -> (Tensor, Tensor)",
    lambda grad, more, x, *rest: (torch.empty_like(x), x.new_empty(3, x.shape[1], dtype=torch.float32)),
)
relu_gradient = _define(
    "norms.relu_gradient",
    "(Tensor grad, Tensor hidden) -> (Tensor, Tensor)",
    lambda grad, hidden: (torch.empty_like(hidden), hidden.new_empty(hidden.shape[1], dtype=torch.float32)),
)
sinusoids = _define(
    "noise.sinusoids",
    "(Tensor position, int width, float log_period) -> Tensor",
    lambda position, width, log_period: position.new_empty(len(position), width, dtype=torch.float32),
)
dropout = _define(
    "noise.dropout",
    "(Tensor x, Tensor key, int salt, float probability) -> Tensor",
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
normal = _define(
    "noise.normal",
    "(Tensor key, int salt, int width) -> Tensor",
    lambda key, salt, width: key.new_empty(len(key), width, dtype=torch.float32),
)


def _leave_second(ctx: Any, output: tuple[Tensor, Tensor]) -> None:
    """Say that the second output, which the gradient needs, has none of its own, not even zeros."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *inputs[1], output[1])
    _leave_second(ctx, output)
    ctx.scale = inputs[-1]


def _gather_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    projected, *sets, log_sums = ctx.saved_tensors
    return _gather_gradient(grad_out, projected, sets, log_sums, ctx.scale), [None] * 3, *[None] * 4


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[2])
    ctx.constants = inputs[3:]


def _scatter_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    queries, keys, *sets = ctx.saved_tensors
    return *_scatter_gradients(grad_out, queries, keys, sets, *ctx.constants), [None] * 3, *[None] * 3


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    _leave_second(ctx, output)


def _pool_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_pool_gradients(grad_out, *ctx.saved_tensors), None, None


def _save_chamfer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1], *inputs[2])
    _leave_second(ctx, output)
    ctx.min_norm = inputs[-1]


def _chamfer_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    target, output, nearest, *tiles = ctx.saved_tensors
    return None, _chamfer_gradient(grad, target, output, tiles, nearest, ctx.min_norm), [None] * 4, None


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    _leave_second(ctx, output)


def _causal_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    return _causal_gradient(grad_out, *ctx.saved_tensors), None, None, None


def _save_divergence(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.free_bits = inputs[-1]


def _divergence_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_divergence_gradients(grad, *ctx.saved_tensors, ctx.free_bits), None, None


def _save_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.use = inputs[2:]


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return dropout(grad, ctx.saved_tensors[0], *ctx.use), None, None, None  # what is 0 is 0 in the gradient as well


gather.register_autograd(_gather_backward, setup_context=_save_gather)
scatter.register_autograd(_scatter_backward, setup_context=_save_scatter)
pool.register_autograd(_pool_backward, setup_context=_save_pool)
chamfer.register_autograd(_chamfer_backward, setup_context=_save_chamfer)
causal.register_autograd(_causal_backward, setup_context=_save_causal)
divergence.register_autograd(_divergence_backward, setup_context=_save_divergence)
dropout.register_autograd(_dropout_backward, setup_context=_save_dropout)
