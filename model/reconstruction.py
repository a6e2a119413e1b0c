"""Symmetric nearest-neighbour distances between the events of sets and their reconstructions (docs/model.md §6).

Shape suffixes: R slots of a set layout, G sets of a class, N slots of a set, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import ops
from model.kernels.ops import uses_kernels
from model.precision import full_precision
from model.ragged import SetLayout

MIN_NORM = 1e-6
"""A shorter vector has no direction; its cosine with any other is 0."""

MAX_CELLS = 1 << 18
"""Maximum number of pairs of events and outputs that are compared at once: 1 MiB for each distance."""


class _Vectors(NamedTuple):
    """Vectors [·, D] with their norms, squared norms and mask (False = padding), each [·, 1]."""

    vector: Tensor
    norm: Tensor
    square: Tensor
    mask: Tensor

    def select(self, slots: slice) -> _Vectors:
        """Return some slots of vectors [G, N, D]."""
        return self if slots == slice(None) else _Vectors(*(x[:, slots] for x in self))


def chamfer_sums(target_RD: Tensor, output_RD: Tensor, layout: SetLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return symmetric nearest-neighbour distances between the events of each set and the vectors decoded for it.

    Both directions are added: every event to its nearest output, every output to its nearest event (Fan et al. 2017,
    arXiv:1612.00603).  The nearest is found for each distance by itself, the first of several at the same distance,
    and the gradient goes through the selected pairs alone.  Pairs are compared in pieces, so that the memory of a set
    grows with its size, not with the square of it.

    Returns:
        Sums over all events of direction (1 − cosine), magnitude (difference of norms, absolute) and squared L2
        distance, float32 scalars.
    """
    sums = target_RD.new_zeros(3, dtype=torch.float32)
    if uses_kernels(target_RD.device):
        sums = ops.chamfer(target_RD, output_RD, layout.tiles, MIN_NORM)[0]
    elif layout.classes:
        with full_precision(target_RD.device):
            target, output = (_measure(x.float(), layout.counted_slots) for x in (target_RD, output_RD))
            to_output, to_target = _find_nearest(target, output, layout)
            sums = _sum_distances(target, output, *to_output) + _sum_distances(output, target, *to_target)
    direction, magnitude, squared = sums.unbind()
    return direction, magnitude, squared


def _measure(vector: Tensor, mask: Tensor) -> _Vectors:
    square = vector.square().sum(1, keepdim=True)
    return _Vectors(vector, square.clamp_min(MIN_NORM**2).sqrt(), square, mask[:, None])


def _find_nearest(target: _Vectors, output: _Vectors, layout: SetLayout) -> list[tuple[Tensor, Tensor]]:
    """Find the nearest output of each target, then the nearest target of each output.

    Returns:
        For both, the products [2, R] with the nearest by direction and by squared distance, and the slots [3, R] of the
        nearest by direction, squared distance and magnitude, without gradient.
    """
    found: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    pieces = []
    for c in layout.classes:
        whole, rest = divmod(c.num_sets, most := max(1, MAX_CELLS // c.size**2))
        pieces += [(c, num_sets) for num_sets in [most] * whole + [rest] * (rest > 0)]
    sizes = [num_sets * c.size for c, num_sets in pieces]
    parts = zip(*(x.split(sizes) for x in (*target, *output)), strict=True)
    for (c, num_sets), part in zip(pieces, parts, strict=True):
        views = [x.view(num_sets, c.size, -1) for x in part]
        t, o = _Vectors(*views[:4]), _Vectors(*views[4:])
        num_slots = max(1, MAX_CELLS // c.size)
        for first in range(0, c.size, num_slots):
            slots = slice(None) if num_slots >= c.size else slice(first, first + num_slots)
            products, distances = _compare(t.select(slots), o, is_padded=c.is_padded)
            found[0].append(_nearest(products, distances, 3))
            if slots != slice(None):
                products, distances = _compare(t, o.select(slots), is_padded=c.is_padded)
            found[1].append(_nearest(products, distances, 2))
    first_of_set_R = torch.arange(layout.num_slots, device=layout.mask.device) - layout.slots_of_position.of_row
    return [(torch.cat([p for p, _ in x], 1), torch.cat([i for _, i in x], 1) + first_of_set_R) for x in found]


def _compare(target: _Vectors, output: _Vectors, *, is_padded: bool) -> tuple[Tensor, Tensor]:
    """Return the products [G, N, M] of N targets and M outputs of each set, and their distances [3, G, N, M] by
    direction, square and magnitude, without gradient.
    """
    products = target.vector @ output.vector.mT
    with torch.no_grad():
        by_direction = 1 - products / (target.norm * output.norm.mT)
        by_square = target.square + output.square.mT - 2 * products
        distances = torch.stack([by_direction, by_square, (target.norm - output.norm.mT).abs()])
        if is_padded:
            distances.masked_fill_(~(target.mask & output.mask.mT), math.inf)
    return products, distances


def _nearest(products_GNM: Tensor, distances_3GNM: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the products with the nearest along ``dim`` by direction and square, [2, ·], and the positions of the
    nearest, [3, ·].
    """
    index = distances_3GNM.min(dim, keepdim=True).indices  # several times as fast as argmin on a CPU
    cell = torch.arange(products_GNM.numel(), device=index.device).view_as(products_GNM).narrow(dim - 1, 0, 1)
    cell_2GNM = cell + index[:2] * products_GNM.stride(dim - 1)
    # The gradient of ``gather`` would keep all products, that of ``index_select`` keeps the indices alone.
    return products_GNM.view(-1).index_select(0, cell_2GNM.view(-1)).view(2, -1), index.view(3, -1)


def _sum_distances(own: _Vectors, others: _Vectors, products_2R: Tensor, nearest_3R: Tensor) -> Tensor:
    """Return [3], the sums of direction, magnitude and squared distance to the nearest."""
    norm, square, mask = (x.squeeze(1) for x in own[1:])
    other_norm, other_square = others.norm.squeeze(1), others.square.squeeze(1)
    by_direction, by_square, by_magnitude = nearest_3R.unbind()
    # The gradient of indexing by brackets depends on the order in which threads come.
    direction = 1 - products_2R[0] / (norm * other_norm.index_select(0, by_direction))
    squared = (square + other_square.index_select(0, by_square) - 2 * products_2R[1]).clamp_min(0)
    magnitude = (norm - other_norm.index_select(0, by_magnitude)).abs()
    return torch.stack([direction, magnitude, squared]) @ mask.float()
