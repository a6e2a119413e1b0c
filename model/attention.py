"""Attention blocks over sets: MAB and ISAB (Lee et al. 2019, Set Transformer, arXiv:1810.00825).

The maths is the design's: ``MAB(q, k) = LN(a + FF(a))`` with ``a = LN(attention(q, k, k))``; residuals stand around
ISAB, not inside MAB.  Identities that hold exactly save most of the work:

* A key's bias adds the same to all scores of a query, and softmax does not see it: there is none.
* ``score(q, k) = (q Wq)·(k Wk) = (q Wq Wkᵀ)·k``.  Queries that all sets share (inducing points) are projected
  through both matrices once per batch and meet the events directly; where sets bring their own queries, the few events
  are projected twice rather than the many inducing rows once.
* ``(Σ w v Wv) Wo = Σ w (v Wv Wo)``: value and output projection are one matrix per head, on the side with fewer rows.
* With one key, attention is that key's value for every query: the inducing rows of a set of one event are equal, and
  computed once.

Per set of n events and m inducing points an ISAB then costs ``10·n + 4·m`` dense products of width × width where the
plain form costs ``8·n + 7·m`` (feed-forward of twice the width): 121 instead of 158 at n = 5.7, m = 16.

Shape suffixes: R slots of a :class:`model.ragged.SetLayout`, G sets of a class, N slots of a set, M queries, H heads, D
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.feed_forward import FeedForward
from model.kernels import ops
from model.kernels.ops import uses_kernels
from model.ragged import SetLayout


class _Tail(torch.autograd.Function):
    """``LN(a + FF(a))`` of ``a = LN(attended + shift)``, with its gradient, by kernels and four products each way.

    Products have the dtype of ``attended``; norms, their output and the sums of biases' gradients are float32.
    """

    @staticmethod
    def forward(ctx: Any, attended: Tensor, shift: Tensor, eps: float, *parameters: Tensor) -> Tensor:
        gain_1, shift_1, w1, b1, w2, b2, gain_2, shift_2 = parameters
        w1, b1, w2, b2 = (each.to(attended.dtype) for each in (w1, b1, w2, b2))
        normed, stats_1 = ops.add_norm(attended, shift, gain_1, shift_1, eps)
        inner = normed.to(attended.dtype)
        hidden = torch.addmm(b1, inner, w1.t()).relu_()
        fed = torch.addmm(b2, hidden, w2.t())
        out, stats_2 = ops.add_norm(normed, fed, gain_2, shift_2, eps)
        ctx.save_for_backward(attended, shift, gain_1, stats_1, normed, inner, hidden, w1, w2, fed, gain_2, stats_2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, shift, gain_1, stats_1, normed, inner, hidden, w1, w2, fed, gain_2, stats_2 = ctx.saved_tensors
        grad_normed, sums_2 = ops.add_norm_gradients(grad, None, normed, fed, gain_2, stats_2)
        grad_fed = grad_normed.to(fed.dtype)
        grad_hidden, grad_b1 = ops.relu_gradient(grad_fed @ w2, hidden)
        grad_attended, sums_1 = ops.add_norm_gradients(grad_normed, grad_hidden @ w1, attended, shift, gain_1, stats_1)
        (grad_gain_1, grad_shift_1, grad_shift), (grad_gain_2, grad_shift_2, grad_b2) = sums_1, sums_2
        grad_w1, grad_w2 = ((left.t() @ right).float() for left, right in ((grad_hidden, inner), (grad_fed, hidden)))
        of_parameters = grad_gain_1, grad_shift_1, grad_w1, grad_b1, grad_w2, grad_b2, grad_gain_2, grad_shift_2
        return grad_attended, grad_shift.to(shift.dtype), None, *of_parameters


class PostAttention(nn.Module):
    """The post-attention MLP of a MAB: ``LN(a + FF(a))`` of ``a = LN(attended + shift)``, one shift for all rows."""

    def __init__(self, width: int, feed_forward: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, feed_forward)
        self.norm_output = nn.LayerNorm(width)

    def forward(self, attended: Tensor, shift: Tensor) -> Tensor:
        first, feed_forward, last = self.norm_attention, self.feed_forward, self.norm_output
        if uses_kernels(attended.device):
            parameters = [
                p for part in (first, feed_forward.expand, feed_forward.contract, last) for p in part.parameters()
            ]
            return _Tail.apply(attended, shift, first.eps, *parameters)
        normed = self.norm_attention(attended + shift)
        return self.norm_output(normed + self.feed_forward(normed))


class MAB(nn.Module):
    """Multihead attention block whose two products of projections are folded where that saves work.

    Args:
        width: D.
        heads: H.
        feed_forward: hidden width of the post-attention MLP.
    """

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(width // heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.post_attention = PostAttention(width, feed_forward)

    def shared_queries(self, queries_MD: Tensor, x_RD: Tensor, layout: SetLayout) -> Tensor:
        """Let queries that are the same for every set attend to the slots of each set.

        Returns:
            [·, D]: M rows for each set, sets in the layout's order; a set of one slot has one row, which stands for M
            equal ones.
        """
        width = queries_MD.shape[1]
        projected_HMK = self.query(queries_MD).view(-1, self.heads, width // self.heads).transpose(0, 1)
        queries_HMD = projected_HMK @ self.key.weight.view(self.heads, -1, width)
        queries_D, values_D = queries_HMD.reshape(-1, width), self._value_output().reshape(-1, width)
        queries_D, values_RHD, attended = queries_D * self.scale, F.linear(x_RD, values_D), []
        parts = zip(layout.classes, layout.split_mask(), layout.split(x_RD), layout.split(values_RHD), strict=True)
        for c, mask, keys, values in parts:
            values = values.view(c.num_sets, c.size * self.heads, width)
            if c.size == 1:
                attended.append(values.sum(1))
                continue
            scores = F.linear(keys, queries_D).view(c.num_sets, c.size, self.heads, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask[:, :, None, None], -math.inf)
            weights = scores.softmax(1, dtype=torch.float32).to(values.dtype).view(c.num_sets, c.size * self.heads, -1)
            attended.append((weights.transpose(1, 2) @ values).view(-1, width))
        return self._after_attention(torch.cat(attended) if attended else x_RD[:0])

    def own_queries(self, x_RD: Tensor, keys: Tensor, layout: SetLayout) -> Tensor:
        """Return [R, D]: the slots of each set attend to the rows that :meth:`shared_queries` returned for the set."""
        width = x_RD.shape[1]
        key_HKD = self.key.weight.view(self.heads, -1, width)
        folded_HDD = key_HKD.transpose(1, 2) @ self.query.weight.view(self.heads, -1, width)
        bias_HD = (self.query.bias.view(self.heads, 1, -1) @ key_HKD).view(-1)
        output = self._value_output().transpose(0, 1).reshape(width, -1)
        queries_RHD = F.linear(x_RD, folded_HDD.reshape(-1, width) * self.scale, bias_HD * self.scale)
        pooled = []
        parts = zip(layout.classes, layout.split(queries_RHD), layout.split_shared(keys), strict=True)
        for c, queries, keys_of_class in parts:
            if c.size == 1:
                pooled.append(keys_of_class.repeat(1, self.heads))
                continue
            keys_GMD = keys_of_class.view(c.num_sets, -1, width)
            queries = queries.view(c.num_sets, c.size * self.heads, width)
            weights = (queries @ keys_GMD.transpose(1, 2)).softmax(-1, dtype=torch.float32).to(keys.dtype)
            pooled.append((weights @ keys_GMD).view(c.num_slots, self.heads * width))
        return self._after_attention(F.linear(torch.cat(pooled), output) if pooled else x_RD[:0])

    def _value_output(self) -> Tensor:
        """Return [H, D, D], the matrix of each head that takes a key to its contribution to the output."""
        width = self.value.weight.shape[1]
        output_HDK = self.output.weight.view(width, self.heads, -1).transpose(0, 1)
        return output_HDK @ self.value.weight.view(self.heads, -1, width)

    def _after_attention(self, attended: Tensor) -> Tensor:
        # Attention weights sum to one, so the value's bias goes through the output projection once.
        return self.post_attention(attended, F.linear(self.value.bias, self.output.weight, self.output.bias))


class Projections(NamedTuple):
    """What the kernels of an ISAB multiply with: products of its projections, of which each set would have its own.

    Attributes:
        gather: [H·D + H·M, D], takes a slot to the values of each head and to its scores with the inducing points.
        queries, queries_bias: [H·D, D] and [H·D], take a slot to the queries with which it meets the inducing rows.
        scattered: [D, H·D], takes what these queries found to the output of the attention.
        gather_shift, scatter_shift: [D], which either attention adds to all rows.
    """

    gather: Tensor
    queries: Tensor
    queries_bias: Tensor
    scattered: Tensor
    gather_shift: Tensor
    scatter_shift: Tensor


class ISAB(nn.Module):
    """Induced set attention, ``MAB(x, MAB(I, x))``: linear in the size of a set.  The caller adds the residual."""

    def __init__(self, width: int, heads: int, feed_forward: int, points: int) -> None:
        super().__init__()
        # As large as the layer-normed slots that they query: with smaller points every query would return the mean.
        self.points = nn.Parameter(torch.randn(points, width))
        self.gather = MAB(width, heads, feed_forward)
        self.scatter = MAB(width, heads, feed_forward)

    def forward(self, x_RD: Tensor, layout: SetLayout, projections: Projections | None = None) -> Tensor:
        """Return [R, D]; kernels take ``projections``, by default those of this block alone."""
        if uses_kernels(x_RD.device):
            return self._run_kernels(x_RD, layout, projections or fold_projections([self])[0])
        induced = self.gather.shared_queries(self.points, x_RD, layout)
        return self.scatter.own_queries(x_RD, induced, layout)

    def _run_kernels(self, x_RD: Tensor, layout: SetLayout, folded: Projections) -> Tensor:
        heads, points, scale = self.gather.heads, len(self.points), self.gather.scale
        projected = F.linear(x_RD, folded.gather)
        attended = ops.gather(projected, layout.sets, heads, points, layout.num_rows(points), scale)[0]
        induced = self.gather.post_attention(attended, folded.gather_shift)
        queries_RHD = F.linear(x_RD, folded.queries, folded.queries_bias)
        found_RHD = ops.scatter(queries_RHD, induced, layout.sets, heads, layout.points_of(len(induced)), scale)
        return self.scatter.post_attention(F.linear(found_RHD, folded.scattered), folded.scatter_shift)


def fold_projections(blocks: Sequence[ISAB]) -> list[Projections]:
    """Return the projections of blocks of one shape, of all at once: they are small, so their number is what they cost.

    In the comments N blocks have 2 N MABs, those that gather before those that scatter.
    """
    number, heads = len(blocks), blocks[0].gather.heads
    mabs = [*(block.gather for block in blocks), *(block.scatter for block in blocks)]
    width = mabs[0].query.in_features
    query, key, value, output = (
        torch.stack([getattr(mab, name).weight for mab in mabs]) for name in ("query", "key", "value", "output")
    )  # [2N, D, D] each
    query_bias, value_bias, output_bias = (
        torch.stack([getattr(mab, name).bias for mab in mabs])[:, None] for name in ("query", "value", "output")
    )  # [2N, 1, D] each
    of_heads = 2 * number * heads, width // heads, width
    keys = key.view(of_heads)
    queries = (keys.transpose(1, 2) @ query.view(of_heads)).view(2 * number, -1, width)
    queries_bias = (query_bias.view(of_heads[0], 1, -1) @ keys).view(2 * number, 1, -1)
    outputs = output.unflatten(2, (heads, -1)).transpose(1, 2).reshape(of_heads[0], width, -1)
    values = (outputs @ value.view(of_heads)).view(2 * number, -1, width)
    # Not the other way round, or the gradients of the outputs would come transposed, and each would be copied.
    shifts = torch.baddbmm(output_bias.mT, output, value_bias.mT).view(2 * number, width).unbind()
    (to_points, queries), (points_bias, queries_bias) = queries.chunk(2), queries_bias.chunk(2)
    gathered, scattered = values.chunk(2)  # [N, H·D, D] each
    points = torch.stack([block.points for block in blocks])
    scored = torch.baddbmm(points_bias, points, to_points.transpose(1, 2))  # [N, M, H·D]
    scored = scored.unflatten(2, (heads, width)).transpose(1, 2).flatten(1, 2)
    scattered = scattered.unflatten(1, (heads, width)).transpose(1, 2).flatten(2)
    of_blocks = (torch.cat([gathered, scored], 1), queries, queries_bias.flatten(1), scattered)
    return list(map(Projections, *(each.unbind() for each in of_blocks), shifts[:number], shifts[number:]))


Folded = Mapping[nn.Module, Projections]
NOT_FOLDED: Folded = MappingProxyType({})
"""Of blocks that fold their own projections."""
