"""Losses as sums over events, sets and patients, to be divided by counts of the whole job (docs/model.md §6).

Nothing here is a mean: a mean over a batch would weight a patient by who shares its batch, a mean over a rank by how
many ranks there are.  Each sum is divided by the number of events, sets or labelled patients of the *global* batch.

Shape suffixes: R slots of a set layout, S sets, B patients, G sets of a class, N slots of a set, D width, K ensemble
heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels import ops
from model.kernels.ops import uses_kernels
from model.precision import full_precision
from model.ragged import SetLayout
from model.seqsetvae import SeqSetVAEOutput
from model.set_vae import Posterior
from pipeline.options import check_section, option

Objective = Literal["joint", "supervised", "pretrain"]
BetaSchedule = Literal["linear", "cyclical"]

DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT = 1.0, 1.0, 3.0
"""Weights of the distances that make up the reconstruction error."""

MIN_NORM = 1e-6
"""A shorter vector has no direction; its cosine with any other is 0."""

MAX_CELLS = 1 << 18
"""Maximum number of pairs of events and outputs that are compared at once: 1 MiB for each distance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Loss"""

    objective: Objective = option(
        "joint",
        "What is learned: sets and outcome (joint), the outcome alone (supervised), or sets alone (pretrain), which "
        "needs no labels.",
    )
    vae_weight: float = option(0.3, "Weight of reconstruction + beta × KL divergence in the loss.", minimum=0)
    classification_weight: float = option(1.0, "Weight of the outcome's cross-entropy in the loss.", minimum=0)
    pos_weight: float = option(
        1.0,
        "Weight of patients with the outcome in the cross-entropy; other than 1 it shifts probabilities.",
        minimum=0,
    )
    beta: float = option(0.1, "Weight of the KL divergence after warm-up.", minimum=0)
    beta_warmup_steps: int = option(5000, "Number of steps over which beta rises from 0.", minimum=0)
    beta_schedule: BetaSchedule = option(
        "linear", "Whether beta rises once (linear) or again after as many steps at its maximum (cyclical)."
    )
    free_bits: float = option(0.1, "KL divergence in nats that each dimension of a set may have at no cost.", minimum=0)

    def __post_init__(self) -> None:
        check_section(self)

    @property
    def learns_sets(self) -> bool:
        return self.objective != "supervised"

    @property
    def learns_outcome(self) -> bool:
        return self.objective != "pretrain"

    @property
    def effective_vae_weight(self) -> float:
        """The weight of the VAE's part under the objective."""
        return {"joint": self.vae_weight, "supervised": 0.0, "pretrain": 1.0}[self.objective]

    @property
    def effective_classification_weight(self) -> float:
        """The weight of the outcome's part under the objective."""
        return self.classification_weight if self.learns_outcome else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCounts:
    """Numbers of events, sets and labelled patients of the global batch, by which sums are divided.

    In a captured graph they are scalars on the device: numbers would be constants there.
    """

    num_events: int | Tensor
    num_sets: int | Tensor
    num_labelled: int | Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of one batch; those of all ranks add up to the losses of the global batch.

    Attributes:
        total: the scalar that is differentiated.
        reconstruction, kl, classification: its parts before they are weighted, without gradient; 0 for a part that was
            not computed.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    classification: Tensor

    def __add__(self, other: Losses) -> Losses:
        """Add the losses of two parts of a batch."""
        return Losses(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def beta_at(options: LossOptions, step: int) -> float:
    """Return the weight of the KL divergence at a step, after a linear warm-up.

    A cycle (Fu et al. 2019, arXiv:1903.10145) is half warm-up, half the maximum.
    """
    warmup = max(options.beta_warmup_steps, 1)
    done = step % (2 * warmup) if options.beta_schedule == "cyclical" else step
    return options.beta * min(1.0, (done + 1) / warmup)


def compute_losses(
    output: SeqSetVAEOutput, label_B: Tensor, options: LossOptions, counts: LossCounts, *, beta: float | Tensor
) -> Losses:
    """Return the sums over this batch divided by the counts of the global batch.

    Args:
        output: of the model; reconstruction and KL divergence need ``decoded``, the cross-entropy needs ``logits``.
        label_B: int64, -1 = unlabelled.
        options: the weights.
        counts: of the global batch.
        beta: weight of the KL divergence at this step; in a captured graph a scalar on the device.
    """
    reconstruction, kl, classification, total = output.context.new_zeros(4, dtype=torch.float32).unbind()
    if output.decoded is not None:
        direction, magnitude, squared = chamfer_sums(output.events, output.decoded, output.sets)
        error = DIRECTION_WEIGHT * direction + MAGNITUDE_WEIGHT * magnitude + SQUARED_WEIGHT * squared
        reconstruction = error / _at_least_one(counts.num_events)
        kl = kl_sum(output.posterior, options.free_bits, output.sets.num_counted) / _at_least_one(counts.num_sets)
        total = options.effective_vae_weight * (reconstruction + beta * kl)
    if output.logits is not None:
        heads = output.logits.shape[1]
        labels = label_B.repeat_interleave(heads)
        entropy = cross_entropy_sum(output.logits.flatten(0, 1), labels, options.pos_weight)
        classification = entropy / heads / _at_least_one(counts.num_labelled)
        total = total + options.effective_classification_weight * classification
    return Losses(
        total=total, reconstruction=reconstruction.detach(), kl=kl.detach(), classification=classification.detach()
    )


def _at_least_one(number: int | Tensor) -> int | Tensor:
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)


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


def kl_per_dimension(posterior: Posterior) -> Tensor:
    """Return [S, D], ``½(exp(logvar) + mu² − 1 − logvar)``: the divergence from a standard normal (Kingma & Welling
    2014, app. B).
    """
    mu, logvar = posterior.mu.float(), posterior.logvar.float()
    return 0.5 * (logvar.exp() + mu.square() - 1 - logvar)


def kl_sum(posterior: Posterior, free_bits: float, num_sets: Tensor) -> Tensor:
    """Return the sum over the first ``num_sets`` [1] sets and all dimensions, each dimension of each set counting at
    least ``free_bits``.

    The floor is that of single sets, not of a batch's mean as in Kingma et al. 2016 (§C.8), so that the loss of a
    patient does not depend on who shares its batch.
    """
    if uses_kernels(posterior.mu.device):
        divergence: Tensor = ops.divergence(posterior.mu, posterior.logvar, num_sets, free_bits)
        return divergence
    is_counted = torch.arange(len(posterior.mu), device=num_sets.device) < num_sets
    return (kl_per_dimension(posterior).clamp_min(free_bits) * is_counted[:, None]).sum()


def cross_entropy_sum(logits_B2: Tensor, label_B: Tensor, pos_weight: float = 1.0) -> Tensor:
    """Return the sum over labelled patients, those of label 1 weighted by ``pos_weight``, without those of label -1."""
    weight = logits_B2.new_ones(2, dtype=torch.float32)
    weight[1:].fill_(pos_weight)  # made on the device: a copy from the host would be waited for
    return F.cross_entropy(logits_B2.float(), label_B, weight, ignore_index=-1, reduction="sum")
