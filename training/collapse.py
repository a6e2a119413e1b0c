"""Gauges of posterior collapse: a posterior that has become the prior tells the rest of the model nothing.

Training steps fill them too, so that a collapse is seen within an epoch, which may take a day.

Active units are those of Burda et al. 2016 (arXiv:1509.00519, §5): the variance over the data of the posterior *mean*
exceeds 0.01.  The variance of the posterior says something else and is reported separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.set_vae import Posterior
from training.parallel import World

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
        # mu, mu², variance and its logarithm of each of ``width`` dimensions, and the number of sets.
        self.sums = torch.zeros(5, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, posterior: Posterior, num_counted: Tensor) -> None:
        """Add the first ``num_counted`` [1] sets of a posterior; others are of filler patients."""
        mu, logvar = posterior.mu.float(), posterior.logvar.float()
        parts = torch.stack([mu, mu.square(), logvar.exp(), logvar, torch.ones_like(mu)])
        is_counted = torch.arange(len(mu), device=mu.device) < num_counted
        self.sums += (parts * is_counted[:, None]).sum(1, dtype=torch.float64)

    def read(self, world: World) -> LatentGauge:
        """Return the gauge of what all ranks have seen since the last call, and begin anew."""
        sums = world.sum(self.sums.clone())
        self.reset()
        return compute_gauge(sums)

    def combine(self, world: World) -> None:
        """Add up the sums of all ranks, which the first rank then holds for all."""
        world.sum(self.sums)
        if not world.is_main:
            self.reset()

    def reset(self) -> None:
        """Begin anew, in place: a captured graph adds to the same memory."""
        self.sums.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what :meth:`load_state_dict` restores."""
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the sums, in place."""
        self.sums.copy_(state["sums"])


def compute_gauge(sums: Tensor) -> LatentGauge:
    """Return the gauge of the sums [5, D] of all ranks."""
    mu, square, variance, logvar, count = sums
    kl = (variance + square - count - logvar) / 2  # the sum of model.losses.kl_per_dimension
    count = count.clamp_min(1)
    variance_of_mean = square / count - (mu / count).square()
    active, mean_variance = int((variance_of_mean > ACTIVE_VARIANCE).sum()), float((variance / count).mean())
    return LatentGauge(float((kl / count).sum()), active, mean_variance, num_units=len(mu))


def is_collapsed(gauge: LatentGauge, min_active_units: float) -> bool:
    """Return whether less than the fraction ``min_active_units`` of the units is active."""
    return gauge.active_units < min_active_units * gauge.num_units
