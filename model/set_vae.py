"""The set VAE: an encoder of the events of a set to a latent, and a decoder back (docs/model.md §2 and §4).

Shape suffixes: R slots of a set layout, S sets, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import ISAB, NOT_FOLDED, Folded
from model.config import SeqSetVAEConfig
from model.feed_forward import FeedForward
from model.kernels import ops
from model.kernels.ops import uses_kernels
from model.precision import full_precision
from model.ragged import SetLayout
from model.segments import take_rows


class Posterior(NamedTuple):
    """A diagonal Gaussian for each set: mean and log variance, each [S, D] float32."""

    mu: Tensor
    logvar: Tensor


def sinusoids(position: Tensor, width: int, longest_period: float = 10_000.0) -> Tensor:
    """Encode positions [·] as [·, width] float32 (Vaswani et al. 2017, §3.5), without a bound on the position."""
    if uses_kernels(position.device):
        encoded: Tensor = ops.sinusoids(position, width, math.log(longest_period))
        return encoded
    half = width // 2
    frequency = torch.exp(-math.log(longest_period) / half * torch.arange(half, device=position.device))
    angle = position.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def run_block(block: Callable[..., Tensor], *arguments: object, checkpointed: bool) -> Tensor:
    """Call a block; if ``checkpointed``, its activations are recomputed for the gradient instead of stored."""
    if checkpointed and torch.is_grad_enabled():
        # Noise is a function of the step, so no generator state has to be restored.
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(*arguments)


class SetEncoder(nn.Module):
    """Encode sets by levels of ``x + ISAB(x)`` over the events of a set; the mean over them gives the posterior."""

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ISAB(config.width, config.heads, config.set_feed_forward, config.inducing_points)
            for _ in range(config.levels)
        )
        self.posterior = nn.Linear(config.width, 2 * config.width)
        # A posterior as wide as the prior would drown the young mean in noise; it begins at a tenth of that width.
        nn.init.constant_(self.posterior.bias[config.width :], 2 * math.log(0.1))
        self.max_logvar = config.max_logvar
        # Events are unit vectors; the inducing rows they meet are layer-normed, of norm sqrt(width).
        self.scale = math.sqrt(config.width)

    def forward(
        self, events_RD: Tensor, layout: SetLayout, folded: Folded = NOT_FOLDED, *, checkpointed: bool = False
    ) -> Posterior:
        """Return the posterior, sets in the layout's sorted order; ``folded`` has projections of blocks."""
        x_RD = events_RD * self.scale
        for block in self.blocks:
            x_RD = x_RD + run_block(block, x_RD, layout, folded.get(block), checkpointed=checkpointed)
        with full_precision(x_RD.device):
            mu, logvar = self.posterior(layout.mean(x_RD.float())).chunk(2, dim=1)
            return Posterior(mu, logvar.clamp(-self.max_logvar, self.max_logvar))


LONGEST_POSITION_PERIOD = 100.0
"""Longest period of a seed's sinusoids, in units of 2π events.

With the usual 10,000 the first ten positions differ in a few channels alone.
"""


class SetDecoder(nn.Module):
    """Decode the latent of a set to as many vectors as the set has events.

    The first level is a PMA with one seed per event, whose only key is the latent: attention is the identity, which
    leaves a layer of seed and latent, here a gated one (Shazeer 2020, arXiv:2002.05202).  The gate, made of both,
    selects what the latent holds for a position.  The levels after it are ``x + ISAB(x)``; ``x + FF(x)`` and a linear
    layer end the decoder.  Seeds are a learned projection of sinusoids: distinct, and unbounded in number.

    Each slot keeps its position: where a seed is only added to a layer of the latent, or a second PMA has to find each
    slot again, reconstruction takes several times as many steps (docs/model.md).
    """

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.set_feed_forward
        wide = 2 * hidden
        self.value, self.gate, self.seed = (nn.Linear(width, wide) for _ in range(3))
        self.joint = nn.Linear(wide, width)
        self.blocks = nn.ModuleList(
            ISAB(width, config.heads, hidden, config.inducing_points) for _ in range(config.levels - 1)
        )
        self.norm, self.feed_forward = nn.LayerNorm(width), FeedForward(width, hidden)
        self.output = nn.Linear(width, width)

    def forward(
        self, latent_SD: Tensor, layout: SetLayout, folded: Folded = NOT_FOLDED, *, checkpointed: bool = False
    ) -> Tensor:
        """Decode latents [S, D] in the layout's sorted order to the slots [R, D]; padding slots are to be ignored."""
        x_RD = run_block(self._first_level, latent_SD, layout, checkpointed=checkpointed)
        for block in self.blocks:
            x_RD = x_RD + run_block(block, x_RD, layout, folded.get(block), checkpointed=checkpointed)
        return self.output(x_RD + self.feed_forward(self.norm(x_RD)))

    def _first_level(self, latent_SD: Tensor, layout: SetLayout) -> Tensor:
        positions = torch.arange(layout.slots_of_position.num_segments, device=latent_SD.device)
        seeds = self.seed(sinusoids(positions, latent_SD.shape[1], LONGEST_POSITION_PERIOD))
        gate_RF = F.silu(take_rows(self.gate(latent_SD), layout.slots) + take_rows(seeds, layout.slots_of_position))
        return self.joint(gate_RF * take_rows(self.value(latent_SD), layout.slots))
