"""Attention pooling over segments of a flat array: the events of a variable, the sets of a patient.

Shape suffixes: N rows, G segments, V prefixes of segments, D width, H heads, K channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels import ops
from model.kernels.ops import uses_kernels
from model.precision import full_precision
from pipeline.arrays import offsets_from_sizes

LOWEST_SCORE = -700.0
"""Scores that are lower than the highest of a batch by more than this count as if they were by this: beyond it an
exponential in float64 would be 0."""

MAX_TABLE = 16
"""Entries a value up to which a table of all that may occur is faster than sorting what does."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Which rows of a flat array belong together.

    Attributes:
        of_row: [N] int64, the segment of each row.
        offsets: [G+1] int64, the first place of each segment among the rows in the order of segments.
        order: [N] int64, the row at each place; None where rows come in the order of their segments.
    """

    of_row: Tensor
    offsets: Tensor
    order: Tensor | None = None

    @property
    def num_segments(self) -> int:
        return self.offsets.shape[0] - 1  # not len(), which torch.export cannot follow

    @classmethod
    def build(cls, of_row: Tensor, num_segments: int = 0) -> Segments:
        """Collect rows [N] int64 that come in any order, on the CPU; ``num_segments`` more than occur have no rows."""
        rows = of_row.numpy()
        counts = np.bincount(rows, minlength=num_segments)
        fits = len(counts) <= 1 << 16  # NumPy sorts 16 bits by radix, 10 × as fast
        order = np.argsort(rows.astype(np.uint16) if fits else rows, kind="stable")
        return cls(of_row, *map(torch.from_numpy, (offsets_from_sizes(counts), order)))

    def rank_in_segment(self) -> Tensor:
        """Return [N] int64, 0, 1, 2 … within each segment, of segments on the CPU."""
        first = self.offsets[self.of_row]
        place = torch.arange(len(self.of_row))
        if self.order is None:
            return place - first
        rank = torch.empty_like(first)
        rank[self.order] = place
        return rank - first


@dataclass(frozen=True, slots=True)
class SegmentPrefixes:
    """Prefixes of segments: the first rows of a segment, so many.

    Attributes:
        rows: [N] int64, the row of a flat array at each place, where those of a segment follow one another; None where
            they do so in the array itself.
        rank: [N] int64, the number of rows of its segment before each place.
        longest: the most rows of a segment.
        ends: [V] as ``of_row``, the last place of each prefix.
    """

    rows: Tensor | None
    rank: Tensor
    longest: int
    ends: Segments


def number_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values that occur in [N] int64, none below 0, in ascending order, and each one's number among them."""
    array = values.numpy()
    bound = int(array.max(initial=-1)) + 1
    if bound > MAX_TABLE * len(array):
        found, number = np.unique(array, return_inverse=True)
    else:
        occurs = np.zeros(bound, dtype=bool)
        occurs[array] = True
        found, number = np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[array]
    return torch.from_numpy(found), torch.from_numpy(number)


def _add_up(x: Tensor, segments: Segments, num_segments: int) -> Tensor:
    """Return the sums of the rows of each segment, [num_segments, …]; segments after the last one have none."""
    if uses_kernels(x.device):
        summed: Tensor = ops.sum_segments(x, segments.order, segments.offsets, num_segments)
        return summed
    # PyTorch's gradient of ``x[of_row]`` adds up in whatever order threads come, and takes 3 to 20 times as long.
    return x.new_zeros(num_segments, *x.shape[1:]).index_add_(0, segments.of_row, x)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> Tensor:
        ctx.segments, ctx.num_segments = segments, x.shape[0]
        return x.index_select(0, segments.of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _add_up(grad, ctx.segments, ctx.num_segments), None


def take_rows(x: Tensor, segments: Segments) -> Tensor:
    """Return [N, …], of x [G, …] the row of each row's segment; its gradient sums up the rows of each segment."""
    taken: Tensor = _TakeRows.apply(x, segments)
    return taken


class _TakeUnique(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def take_unique(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x[rows]`` for rows of which none comes twice, so that its gradient has nothing to add up."""
    taken: Tensor = _TakeUnique.apply(x, rows)
    return taken


class _PutUnique(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def put_unique(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Return [num_rows, …], zeros but for the rows of x, each at a row of its own."""
    put: Tensor = _PutUnique.apply(x, rows, num_rows)
    return put


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(segments.of_row)  # ``index_add`` would keep all of x
        return _add_up(x, segments, segments.num_segments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None


def sum_rows(x: Tensor, segments: Segments) -> Tensor:
    """Return [G, …], the sums of the rows [N, …] of each segment."""
    summed: Tensor = _SumRows.apply(x, segments)
    return summed


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return ``x[order]`` for a permutation; its gradient takes rows by the inverse, which nobody has to add up."""
    permuted: Tensor = _PermuteRows.apply(x, order, inverse)
    return permuted


def attention_pool(values_ND: Tensor, scores_NH: Tensor, segments: Segments) -> Tensor:
    """Return [G, D] float32, the mean of the values of each segment, weighted by the softmax of its scores.

    Args:
        values_ND: the values that are pooled.
        scores_NH: the scores of each row; a head pools an H-th of the channels.  -inf leaves a row out, and every
            segment has a finite one.
        segments: of the rows.
    """
    if uses_kernels(values_ND.device):
        return ops.pool(values_ND, scores_NH, segments.order, segments.offsets)[0]
    with full_precision(values_ND.device):
        values_NHK, scores_NH = values_ND.float().unflatten(1, (scores_NH.shape[1], -1)), scores_NH.float()
        row, num_segments = segments.of_row, segments.num_segments
        maximum = scores_NH.new_full((num_segments, scores_NH.shape[1]), -torch.inf)
        maximum = maximum.scatter_reduce(0, row[:, None].expand_as(scores_NH), scores_NH.detach(), "amax")
        weight_NH = (scores_NH - maximum[row]).exp()
        total = torch.zeros_like(maximum).index_add(0, row, weight_NH)
        pooled = values_NHK.new_zeros(num_segments, *values_NHK.shape[1:])
        pooled = pooled.index_add(0, row, values_NHK * weight_NH[..., None]) / total[..., None]
        return pooled.flatten(1)


class _RunningSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: Tensor, longest: int) -> Tensor:
        ctx.save_for_backward(rank)
        ctx.longest = longest
        return _scan(x, rank, longest, is_reversed=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scan(grad, ctx.saved_tensors[0], ctx.longest, is_reversed=True), None, None


def _scan(x: Tensor, rank: Tensor, longest: int, *, is_reversed: bool) -> Tensor:
    """Return at each place the sum of the rows of its segment up to it, or from it on, in log2(longest) passes.

    Each pass adds the sum that ends, or begins, as many places away as the own one has rows (Hillis & Steele 1986).
    """
    x, distance = x.clone(), 1
    while distance < longest:
        is_own = (rank[distance:] >= distance).view(-1, *[1] * (x.ndim - 1))
        if is_reversed:
            x[:-distance] += x[distance:] * is_own
        else:
            x[distance:] += x[:-distance] * is_own
        distance *= 2
    return x


def pool_prefixes(values_ND: Tensor, scores_NH: Tensor, prefixes: SegmentPrefixes) -> Tensor:
    """Return [V, D] float32, what :func:`attention_pool` gives the first rows of segments.

    A row is weighed and added once, however many prefixes it is in.  Sums are of float64, so that a late row with a
    high score takes nothing from those before it.

    Args:
        values_ND, scores_NH: as there; every score is finite.
        prefixes: of the segments.
    """
    if prefixes.rows is not None:
        values_ND, scores_NH = (take_unique(each, prefixes.rows) for each in (values_ND, scores_NH))
    scores_NH = scores_NH.double()
    highest_H = F.pad(scores_NH.detach(), (0, 0, 0, 1), value=-torch.inf).amax(0)
    weight_NH1 = (scores_NH - highest_H).clamp_min(LOWEST_SCORE).exp()[..., None]
    values_NHK = values_ND.double().unflatten(1, (scores_NH.shape[1], -1)) * weight_NH1
    weighted = torch.cat([values_NHK, weight_NH1], dim=2)
    sums: Tensor = _RunningSums.apply(weighted, prefixes.rank, prefixes.longest)
    return take_rows((sums[..., :-1] / sums[..., -1:]).flatten(1).float(), prefixes.ends)
