"""The posterior of a set as one launch each: its sample, and the sum of its divergence from the prior."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def divergence_kernel(mu, logvar, num_sets, sums, width, free_bits, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(num_sets) * width
    mean, log_variance = (
        tl.load(mu + cell, mask=cell < total, other=0.0),
        tl.load(logvar + cell, mask=cell < total, other=0.0),
    )
    divergence = 0.5 * (tl.exp(log_variance) + mean * mean - 1 - log_variance)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(cell < total, tl.maximum(divergence, free_bits), 0.0), 0))


@triton.jit
def divergence_gradient_kernel(
    grad, mu, logvar, num_sets, grad_mu, grad_logvar, total, width, free_bits, BLOCK: tl.constexpr
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = cell < tl.load(num_sets) * width
    mean, log_variance = (
        tl.load(mu + cell, mask=counted, other=0.0),
        tl.load(logvar + cell, mask=counted, other=0.0),
    )
    variance = tl.exp(log_variance)
    factor = tl.where(0.5 * (variance + mean * mean - 1 - log_variance) >= free_bits, tl.load(grad), 0.0)
    factor = tl.where(counted, factor, 0.0)
    tl.store(grad_mu + cell, factor * mean, mask=cell < total)
    tl.store(grad_logvar + cell, factor * 0.5 * (variance - 1), mask=cell < total)


def divergence(mu: Tensor, logvar: Tensor, num_sets: Tensor, free_bits: float) -> Tensor:
    """Return the sum of :func:`model.losses.kl_sum`, a float32 scalar, of means and log variances [S, D] float32."""
    programs = triton.cdiv(mu.numel(), BLOCK)
    sums = torch.zeros(max(programs, 1), device=mu.device)
    if programs:
        divergence_kernel[programs,](mu, logvar, num_sets, sums, mu.shape[1], free_bits, BLOCK=BLOCK)
    return sums.sum()


def divergence_gradients(
    grad: Tensor, mu: Tensor, logvar: Tensor, num_sets: Tensor, free_bits: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of means and log variances of :func:`divergence`."""
    grads = torch.empty_like(mu), torch.empty_like(logvar)
    programs = triton.cdiv(mu.numel(), BLOCK)
    if programs:
        divergence_gradient_kernel[programs,](
            grad, mu, logvar, num_sets, *grads, mu.numel(), mu.shape[1], free_bits, BLOCK=BLOCK
        )
    return grads
