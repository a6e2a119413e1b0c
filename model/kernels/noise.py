"""Dropout and normal noise as one launch each, by the hash of :mod:`model.noise`: the same bits as on the CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _mix(x):
    """Apply the finaliser of SplitMix64 to each uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _bits(key, row, channel, inside, salt):
    """Return 64 random bits for each (row, channel); ``salt`` is the row's offset of this use."""
    row_key = tl.load(key + row, mask=inside, other=0).to(tl.uint64, bitcast=True) + salt.to(tl.uint64, bitcast=True)
    golden: tl.constexpr = 0x9E3779B97F4A7C15
    return _mix(_mix(row_key) + (channel + 1).to(tl.uint64) * golden)


@triton.jit
def dropout_kernel(x, key, out, total, salt, threshold, keep_share, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < total
    row, channel = cell // WIDTH, cell % WIDTH
    draw = (_bits(key, row, channel // 4, inside, salt) >> (16 * (channel % 4)).to(tl.uint64)) & 0xFFFF
    # The draw's 16 bits count as signed, as they do on the CPU; flipping the sign bit keeps their order.
    keep = (draw ^ 0x8000).to(tl.int32) >= threshold
    value = tl.load(x + cell, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cell, tl.where(keep, tl.math.div_rn(value, keep_share), 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def normal_kernel(key, out, total, salt, HALF: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < total
    row, channel = cell // HALF, cell % HALF
    bits = _bits(key, row, channel, inside, salt)
    unit: tl.constexpr = 1.0 / (1 << 24)
    turn: tl.constexpr = 2 * 3.141592653589793 * unit
    first = ((bits & 0xFFFFFF).to(tl.float32) + 0.5) * unit
    angle = ((bits >> 32) & 0xFFFFFF).to(tl.float32) * turn
    radius = tl.sqrt(-2 * tl.log(first))
    at = row * (2 * HALF) + channel
    tl.store(out + at, radius * tl.cos(angle), mask=inside)
    tl.store(out + at + HALF, radius * tl.sin(angle), mask=inside)


@triton.jit
def sinusoids_kernel(position, out, total, log_period, HALF: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, channel = cell // HALF, cell % HALF
    angle = tl.load(position + row, mask=cell < total, other=0).to(tl.float32) * tl.exp(
        -log_period / HALF * channel.to(tl.float32)
    )
    at = row * (2 * HALF) + channel
    tl.store(out + at, tl.sin(angle), mask=cell < total)
    tl.store(out + at + HALF, tl.cos(angle), mask=cell < total)


def sinusoids(position: Tensor, width: int, log_period: float) -> Tensor:
    """Return [N, width] float32, sines and cosines of positions [N] int64; see :func:`model.set_vae.sinusoids`."""
    out = torch.empty(len(position), width, dtype=torch.float32, device=position.device)
    total = len(position) * (width // 2)
    sinusoids_kernel[(max(triton.cdiv(total, BLOCK), 1),)](
        position, out, total, log_period, HALF=width // 2, BLOCK=BLOCK
    )
    return out


def dropout(x: Tensor, key: Tensor, salt: int, probability: float) -> Tensor:
    """Return [S, D] like x, with inverted dropout by the noise of ``key`` [S] int64 and the row offset ``salt``."""
    out = torch.empty_like(x)
    threshold = round(probability * (1 << 16))
    grid = (max(triton.cdiv(x.numel(), BLOCK), 1),)
    dropout_kernel[grid](x, key, out, x.numel(), salt, threshold, 1 - probability, WIDTH=x.shape[1], BLOCK=BLOCK)
    return out


def normal(key: Tensor, salt: int, width: int) -> Tensor:
    """Return [S, width] float32, standard normal noise of ``key`` [S] int64 and the row offset ``salt``."""
    out = torch.empty(len(key), width, dtype=torch.float32, device=key.device)
    total = len(key) * (width // 2)
    normal_kernel[(max(triton.cdiv(total, BLOCK), 1),)](key, out, total, salt, HALF=width // 2, BLOCK=BLOCK)
    return out
