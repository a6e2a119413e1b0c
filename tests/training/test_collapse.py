from __future__ import annotations

import math

import pytest
import torch

from model.set_vae import Posterior
from training.collapse import CollapseGauges, is_collapsed


def gauge(*posteriors: Posterior) -> CollapseGauges:
    gauges = CollapseGauges(posteriors[0].mu.shape[1], torch.device("cpu"))
    for posterior in posteriors:
        gauges.update(posterior)
    return gauges


def test_by_hand_and_over_batches() -> None:
    """Means 0 and 1 vary by 0.25, the constant 3 not at all however large it is, 0.1 and -0.1 by 0.01: not *above*
    it."""
    mu = torch.tensor([[0.0, 3.0, 0.0999], [1.0, 3.0, -0.0999]])
    logvar = torch.full((2, 3), math.log(0.5))
    together = gauge(Posterior(mu, logvar)).compute()
    apart = gauge(Posterior(mu[:1], logvar[:1]), Posterior(mu[1:], logvar[1:])).compute()
    assert together == apart
    assert together.active_units == 1
    assert together.mean_posterior_variance == pytest.approx(0.5)
    each = 0.5 * (0.5 - 1 + math.log(2))
    assert together.kl == pytest.approx(3 * each + 0.5 * (0.5 + 9 + 0.0999**2), rel=1e-5)


def test_a_posterior_equal_to_the_prior_is_collapsed_and_a_spread_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    flat, spread = torch.zeros(100, 50), torch.randn(100, 50, generator=generator)
    assert is_collapsed(gauge(Posterior(flat, torch.zeros(100, 50))).compute(), 0.02)
    assert not is_collapsed(gauge(Posterior(spread, torch.full((100, 50), -2.0))).compute(), 0.02)


def test_posterior_variance_alone_does_not_make_a_unit_active() -> None:
    assert gauge(Posterior(torch.zeros(10, 4), torch.full((10, 4), -5.0))).compute().active_units == 0
