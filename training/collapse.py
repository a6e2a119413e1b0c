"""Gauges of posterior collapse: a posterior that has become the prior tells the rest of the model nothing.

Active units are those of Burda et al. 2016 (arXiv:1509.00519, §5): the variance over the data of the posterior *mean*
exceeds 0.01.  The variance of the posterior says something else and is reported separately.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.losses import kl_per_dimension
from model.set_vae import Posterior

ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True, slots=True)
class LatentGauge:
    """The state of the posterior over some data: ``kl`` is of a set, in nats, without free bits."""

    kl: float
    active_units: int
    mean_posterior_variance: float
    num_units: int


class CollapseGauges:
    """Gather sums over batches in float64 on the device, without waiting for it."""

    def __init__(self, width: int, device: torch.device) -> None:
        # mu, mu², variance and KL of each of ``width`` dimensions, and the number of sets.
        self.sums = torch.zeros(5, width, dtype=torch.float64, device=device)

    def update(self, posterior: Posterior) -> None:
        mu = posterior.mu.double()
        parts = (mu, mu.square(), posterior.logvar.double().exp(), kl_per_dimension(posterior).double())
        self.sums += torch.stack([*(part.sum(0) for part in parts), torch.full_like(self.sums[0], len(mu))])

    def compute(self) -> LatentGauge:
        """Return the gauge of ``sums``, which ranks may have added up before."""
        mu, square, variance, kl, count = self.sums
        count = count.clamp_min(1)
        variance_of_mean = square / count - (mu / count).square()
        active, mean_variance = int((variance_of_mean > ACTIVE_VARIANCE).sum()), float((variance / count).mean())
        return LatentGauge(float((kl / count).sum()), active, mean_variance, num_units=len(mu))


def is_collapsed(gauge: LatentGauge, min_active_units: float) -> bool:
    """Return whether less than the fraction ``min_active_units`` of the units is active."""
    return gauge.active_units < min_active_units * gauge.num_units
