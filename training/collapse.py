"""Gauges of posterior collapse: a posterior that has become the prior tells the rest of the model nothing.

Active units are those of Burda et al. 2016 (arXiv:1509.00519, §5): the variance over the data of the posterior *mean*
exceeds 0.01.  The posterior's variance says something else and is given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.losses import kl_per_dimension
from model.set_vae import Posterior

ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelGauge:
    """One level's state over some data.

    Attributes:
        kl: nats a set, without free bits.
        active_units: dimensions whose posterior mean varies over sets by more than 0.01.
        mean_posterior_variance: over sets and dimensions; 1 is the prior's.
        num_units: dimensions in all.
    """

    kl: float
    active_units: int
    mean_posterior_variance: float
    num_units: int


class CollapseGauges:
    """Gathers sums over batches, in float64 on the device, without waiting for it.

    Args:
        levels: levels of the encoder.
        width: dimensions of each.
    """

    def __init__(self, levels: int, width: int, device: torch.device) -> None:
        # mu, mu², variance, KL for every level and dimension, and the count of sets in the last row.
        self.sums = torch.zeros(levels * 4 + 1, width, dtype=torch.float64, device=device)

    def update(self, posteriors: Sequence[Posterior]) -> None:
        rows: list[Tensor] = []
        for posterior in posteriors:
            mu = posterior.mu.double()
            parts = (mu, mu.square(), posterior.logvar.double().exp(), kl_per_dimension(posterior).double())
            rows += [part.sum(0) for part in parts]
        rows.append(torch.full_like(rows[0], posteriors[0].mu.shape[0]))
        self.sums += torch.stack(rows)

    def compute(self) -> list[LevelGauge]:
        """The gauges of every level; reads ``sums``, which ranks may have added up before."""
        count = self.sums[-1, 0].clamp_min(1)
        gauges = []
        for mu, square, variance, kl in self.sums[:-1].view(-1, 4, self.sums.shape[1]).unbind():
            over_data = square / count - (mu / count).square()
            gauges.append(
                LevelGauge(
                    kl=float(kl.sum() / count),
                    active_units=int((over_data > ACTIVE_VARIANCE).sum()),
                    mean_posterior_variance=float((variance / count).mean()),
                    num_units=self.sums.shape[1],
                )
            )
        return gauges


def is_collapsed(gauges: Sequence[LevelGauge], least_active: float) -> bool:
    """Whether fewer than ``least_active`` of the units are active in the deepest level, the one that stands for the
    set.
    """
    return gauges[-1].active_units < least_active * gauges[-1].num_units
