"""Losses as sums over real things, to be divided by counts of the whole job (design §7.5).

Nothing here is a mean: a mean over a batch would weigh a patient by who shares its batch, a mean over a rank by how
many ranks there are.  The trainer divides each sum by the number of events, sets or labelled patients of the *global*
batch.

Shape suffixes: R rows of a layout, S sets, B patients, G sets of a class, N rows a set of it, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.ragged import SetLayout
from model.set_vae import Posterior

SMALLEST_NORM = 1e-6
"""Below it a vector has no direction; its cosine with anything is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """What each part weighs; defaults are design §7.5's.

    Attributes:
        direction, magnitude, squared: parts of the reconstruction.
        vae: the VAE's part of the total, reconstruction plus beta times KL divergence.
        classification: the outcome's part of the total.
        positive: of a patient with the outcome, within it; one without weighs 1.
        beta: weight of the KL divergence within the VAE's part, once warmed up.
        free_bits: nats a dimension of a set may diverge at no cost (Kingma et al. 2016, §C.8).
    """

    direction: float = 1.0
    magnitude: float = 1.0
    squared: float = 3.0
    vae: float = 0.3
    classification: float = 1.0
    positive: float = 1.0
    beta: float = 0.1
    free_bits: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCounts:
    """How many real things the sums run over, in the global batch."""

    num_events: int
    num_sets: int
    num_labelled: int


def chamfer_sums(target_RD: Tensor, output_RD: Tensor, layout: SetLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric nearest-neighbour distances between each set's events and the vectors decoded for it.

    Both directions are added: every event to its nearest output, every output to its nearest event (Fan et al. 2017,
    arXiv:1612.00603).  The nearest is found for each distance by itself.

    Returns:
        Sums over all real events of direction (1 − cosine), magnitude (difference of norms, absolute) and squared L2
        distance, float32 scalars.
    """
    sums = [target_RD.new_zeros(3, dtype=torch.float32)]
    with torch.autocast(target_RD.device.type, enabled=False):
        targets, outputs = layout.split(target_RD.float()), layout.split(output_RD.float())
        for c, flat_target, flat_output in zip(layout.classes, targets, outputs, strict=True):
            target = flat_target.view(c.num_sets, c.size, -1)
            output = flat_output.view(c.num_sets, c.size, -1)
            target_square, output_square = target.square().sum(2)[:, :, None], output.square().sum(2)[:, None, :]
            target_norm = target_square.clamp_min(SMALLEST_NORM**2).sqrt()
            output_norm = output_square.clamp_min(SMALLEST_NORM**2).sqrt()
            product = target @ output.transpose(1, 2)
            distances = torch.stack(
                [
                    1 - product / (target_norm * output_norm),
                    (target_norm - output_norm).abs(),
                    (target_square + output_square - 2 * product).clamp_min(0),
                ]
            )
            if c.real is None:
                sums.append(distances.amin(2).sum((1, 2)) + distances.amin(3).sum((1, 2)))
                continue
            to_event = distances.masked_fill(~c.real[:, :, None], math.inf).amin(2)
            to_output = distances.masked_fill(~c.real[:, None, :], math.inf).amin(3)
            sums.append(((to_event + to_output) * c.real).sum((1, 2)))
    direction, magnitude, squared = torch.stack(sums).sum(0).unbind()
    return direction, magnitude, squared


def kl_per_dimension(posterior: Posterior) -> Tensor:
    """[S, D], ``½(exp(logvar) + mu² − 1 − logvar)``: divergence from a standard normal (Kingma & Welling 2014, app.
    B).
    """
    mu, logvar = posterior.mu.float(), posterior.logvar.float()
    return 0.5 * (logvar.exp() + mu.square() - 1 - logvar)


def kl_sum(posteriors: Sequence[Posterior], free_bits: float) -> Tensor:
    """Sum over levels, sets and dimensions, each dimension of each set counting at least ``free_bits``.

    The floor stands under single sets, not under a batch's mean as in Kingma et al., so that a patient's loss does
    not depend on who shares its batch.
    """
    return torch.stack([kl_per_dimension(p).clamp_min(free_bits).sum() for p in posteriors]).sum()


def cross_entropy_sum(logits_B2: Tensor, label_B: Tensor, positive: float = 1.0) -> Tensor:
    """Sum over labelled patients, those of label 1 weighing ``positive``; a label of -1 adds nothing."""
    weight = logits_B2.new_tensor([1.0, positive], dtype=torch.float32)
    return F.cross_entropy(logits_B2.float(), label_B, weight, ignore_index=-1, reduction="sum")
