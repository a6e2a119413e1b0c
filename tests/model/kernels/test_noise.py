"""Noise, divergence and sinusoids of the kernels are those of the CPU, noise to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels.ops import choose_kernels
from model.losses import kl_sum
from model.noise import Noise, PatientNoise
from model.set_vae import Posterior, sinusoids
from tests.model.kernels.helpers import check


def noise(rows: int) -> Noise:
    patients = PatientNoise.for_step(["a", "b", "c"], seed=1, step=3)
    return patients.for_rows(torch.arange(rows) % 3, torch.arange(rows))


def on_cpu(compute: Callable[..., Any], *arguments: Any) -> Any:
    with choose_kernels(False):
        return compute(*arguments)


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (40, 128), (0, 8)])
def test_dropout_to_the_bit(shape: tuple[int, int], probability: float) -> None:
    rows, x = noise(shape[0]), torch.randn(shape, requires_grad=True)
    found, expected = rows.dropout(x, 17, probability), on_cpu(rows.dropout, x, 17, probability)
    assert torch.equal(found, expected)
    grad = torch.randn(shape)
    assert torch.equal(*(torch.autograd.grad(of, x, grad)[0] for of in (found, expected)))


def test_normal_noise() -> None:
    rows = noise(30)
    torch.testing.assert_close(rows.normal(0, 64), on_cpu(rows.normal, 0, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_sets", [0, 17, 40])
def test_divergence(num_sets: int) -> None:
    mu, logvar = (torch.randn(40, 64, requires_grad=True) for _ in range(2))
    counted = torch.tensor([num_sets])

    def reference() -> Tensor:
        result: Tensor = on_cpu(kl_sum, Posterior(mu, logvar), 0.1, counted)
        return result

    check(lambda: kl_sum(Posterior(mu, logvar), 0.1, counted), reference, [mu, logvar])


def test_sinusoids() -> None:
    position = torch.tensor([0, 1, 5, 900])
    torch.testing.assert_close(sinusoids(position, 16), on_cpu(sinusoids, position, 16), rtol=0, atol=1e-4)
