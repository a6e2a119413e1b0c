"""The set VAE: events of a set -> latent, latent -> events (design §7.2 and §7.4).

Shape suffixes: R rows of a layout, S sets, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import ISAB
from model.config import SeqSetVAEConfig
from model.feed_forward import FeedForward
from model.ragged import SetLayout


class Posterior(NamedTuple):
    """A diagonal Gaussian per set: mean and log variance, each [S, D] float32."""

    mu: Tensor
    logvar: Tensor


def sinusoids(position: Tensor, width: int, longest_period: float = 10_000.0) -> Tensor:
    """[·] -> [·, width] float32 (Vaswani et al. 2017, §3.5), defined for every position however large."""
    half = width // 2
    frequency = torch.exp(-math.log(longest_period) / half * torch.arange(half, device=position.device))
    angle = position.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def run_block(block: Callable[..., Tensor], *arguments: object, checkpointed: bool) -> Tensor:
    """``block(*arguments)``, keeping its activations or, when checkpointed, computing them again for the gradient."""
    if checkpointed and torch.is_grad_enabled():
        # Noise is a function of the step, so there is no generator state to restore.
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(*arguments)


def _posterior_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 2 * width)
    # A posterior as wide as the prior would drown the young mean in noise; it begins at a tenth of that width.
    nn.init.constant_(head.bias[width:], 2 * math.log(0.1))
    return head


class SetEncoder(nn.Module):
    """Levels of ``x + ISAB(x)`` over the events of one set; a posterior from the mean of its elements at each level."""

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ISAB(config.width, config.heads, config.set_feed_forward, config.inducing_points)
            for _ in range(config.levels)
        )
        self.heads = nn.ModuleList(_posterior_head(config.width) for _ in range(config.levels))
        self.max_logvar = config.max_logvar
        # Events are unit vectors; the rows they meet are layer-normed, of norm sqrt(width).
        self.scale = math.sqrt(config.width)

    def forward(self, events_RD: Tensor, layout: SetLayout, *, checkpointed: bool = False) -> list[Posterior]:
        """The posterior of every level, sets in the layout's sorted order; the last stands for the set."""
        posteriors = []
        rows_RD = events_RD * self.scale
        for block, head in zip(self.blocks, self.heads, strict=True):
            rows_RD = rows_RD + run_block(block, rows_RD, layout, checkpointed=checkpointed)
            with torch.autocast(rows_RD.device.type, enabled=False):
                mu, logvar = head(layout.mean(rows_RD.float())).chunk(2, dim=1)
                posteriors.append(Posterior(mu, logvar.clamp(-self.max_logvar, self.max_logvar)))
        return posteriors


LONGEST_PLACE_PERIOD = 100.0
"""Of sinusoids, in units of 2π events: with the usual 10,000 the first ten places differ in a few channels alone."""


class SetDecoder(nn.Module):
    """Latent of a set -> as many vectors as the set has events.

    Level one is a PMA with one seed per event wanted, whose only key is the latent: attention is the identity, and what
    is left is a layer of seed and latent together, here a gated one (Shazeer 2020, arXiv:2002.05202): the gate, of
    both, says what stands at a place, and lets through what the latent holds for it.  The levels after it are
    ``x + ISAB(x)``; ``x + FF(x)`` and a linear layer end it.  Seeds are a learned projection of sinusoids: distinct,
    and without a bound on their number.

    Each row keeps its place: where a seed is only added to a layer of the latent, or a second PMA has to find each row
    again, reconstruction takes several times as many steps (docs/model.md).
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

    def forward(self, latent_SD: Tensor, layout: SetLayout, *, checkpointed: bool = False) -> Tensor:
        """[S, D] in the layout's sorted order -> [R, D], rows of the layout; padding rows hold nothing of meaning."""
        rows_RD = run_block(self._first_level, latent_SD, layout, checkpointed=checkpointed)
        for block in self.blocks:
            rows_RD = rows_RD + run_block(block, rows_RD, layout, checkpointed=checkpointed)
        return self.output(rows_RD + self.feed_forward(self.norm(rows_RD)))

    def _first_level(self, latent_SD: Tensor, layout: SetLayout) -> Tensor:
        most = layout.classes[-1].size if layout.classes else 0
        places = sinusoids(torch.arange(most, device=latent_SD.device), latent_SD.shape[1], LONGEST_PLACE_PERIOD)
        gate_RF = F.silu(self.gate(latent_SD)[layout.set_of_row] + self.seed(places)[layout.place_in_set])
        return self.joint(gate_RF * self.value(latent_SD)[layout.set_of_row])
