"""The set VAE: events of a set -> latent, latent -> events (design §7.2 and §7.4).

Shape suffixes: R rows of a layout, S sets, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import ISAB, PMA, OneKeyMAB
from model.config import SeqSetVAEConfig
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


def run_block(block: nn.Module, *arguments: object, checkpointed: bool) -> Tensor:
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


class SetDecoder(nn.Module):
    """Latent of a set -> as many vectors as the set has events.

    Each level is ``x + ISAB(x)`` and then a PMA with one seed per event wanted.  The first level starts from a set of
    one element, so its three MABs have one key and all of it is dense layers on one row a set.  Seeds are a learned
    projection of sinusoids: distinct, and without a bound on their number.
    """

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        shape = (config.width, config.heads, config.set_feed_forward)
        # ISAB of one element is two MABs in a row, the pool a third.
        self.first_block = nn.Sequential(*(OneKeyMAB(config.width, config.set_feed_forward) for _ in range(2)))
        self.first_pool = OneKeyMAB(config.width, config.set_feed_forward)
        self.blocks = nn.ModuleList(ISAB(*shape, config.inducing_points) for _ in range(config.levels - 1))
        self.pools = nn.ModuleList(PMA(*shape) for _ in range(config.levels - 1))
        self.seeds = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.levels))
        self.output = nn.Linear(config.width, config.width)

    def forward(self, latent_SD: Tensor, layout: SetLayout, *, checkpointed: bool = False) -> Tensor:
        """[S, D] in the layout's sorted order -> [R, D], rows of the layout; padding rows hold nothing of meaning."""
        most = layout.classes[-1].size if layout.classes else 0
        places = sinusoids(torch.arange(most, device=latent_SD.device), latent_SD.shape[1])
        pooled_SD = self.first_pool(latent_SD + self.first_block(latent_SD))
        rows_RD = self.seeds[0](places)[layout.place_in_set] + pooled_SD[layout.set_of_row]
        for block, pool, seed in zip(self.blocks, self.pools, self.seeds[1:], strict=True):
            rows_RD = rows_RD + run_block(block, rows_RD, layout, checkpointed=checkpointed)
            rows_RD = run_block(pool, seed(places), rows_RD, layout, checkpointed=checkpointed)
        return self.output(rows_RD)
