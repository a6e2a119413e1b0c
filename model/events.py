"""The vector that stands for an event, made of its variable and its value (docs/model.md §1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import SeqSetVAEConfig
from model.kernels.ops import uses_kernels
from model.precision import full_precision
from model.segments import Segments, take_rows
from pipeline.schema import PADDING_CODE, UNKNOWN_CODE


def has_number(code: Tensor, has_value: Tensor) -> Tensor:
    """Return [·] bool, whether the value of an event is used as a number.

    The value of an unknown variable is not, because its scale is unknown.
    """
    return has_value & (code != UNKNOWN_CODE)


class EventEncoder(nn.Module):
    """Encode events, (code, value) -> [·, width].

    Variables have embeddings e_c, given and frozen or learned; r_c = W e_c is computed once per code, not per event.

    * ``product``: ``x = r_c/|r_c| · v``.  An event at the mean vanishes, an event with no number is zero.
    * ``additive``: ``x = r_c/|r_c| + asinh(v) · s_c/|s_c|`` with ``s_c = W' e_c``, and a learned vector in place of the
      second term where there is no number.  asinh leaves small z-scores as they are and keeps a recording error of 50
      standard deviations from outweighing its whole set.
    """

    def __init__(self, config: SeqSetVAEConfig, embeddings: Tensor | None = None) -> None:
        super().__init__()
        self.event_form = config.event_form
        table = torch.empty(config.num_codes, config.embedding_dim)
        if embeddings is None:
            nn.init.normal_(table, std=config.embedding_dim**-0.5)
        else:
            if embeddings.shape != table.shape:
                shapes = f"{tuple(embeddings.shape)}, the configuration says {tuple(table.shape)}"
                raise ValueError(f"embeddings are {shapes}")
            table.copy_(embeddings)
        with torch.no_grad():
            table[PADDING_CODE] = 0
        self.embedding = nn.Parameter(table, requires_grad=not config.frozen_embeddings)
        self.variable = nn.Linear(config.embedding_dim, config.width, bias=False)
        if self.event_form == "additive":
            self.scale = nn.Linear(config.embedding_dim, config.width, bias=False)
            self.no_number = nn.Parameter(torch.zeros(config.width))

    def forward(self, embedding_UE: Tensor, codes: Segments, value: Tensor, number: Tensor) -> Tensor:
        """Encode events as [N, width] float32, also under autocast: they are the target of the reconstruction.

        Args:
            embedding_UE: the embeddings of the codes that occur.
            codes: which of these each of N events has, as its segment.
            value: [N] float32.
            number: [N] bool, see :func:`has_number`.
        """
        with full_precision(value.device):
            if self.event_form == "product":
                return take_rows(F.normalize(self.variable(embedding_UE), dim=1), codes) * (value * number)[:, None]
            if uses_kernels(value.device):  # there are few codes, so launches alone cost anything
                weights = torch.cat([self.variable.weight, self.scale.weight])
                both = F.normalize(F.linear(embedding_UE, weights).unflatten(1, (2, -1)), dim=2)
                direction, scale = take_rows(both, codes).unbind(1)
            else:
                directions = (F.normalize(layer(embedding_UE), dim=1) for layer in (self.variable, self.scale))
                direction, scale = (take_rows(each, codes) for each in directions)
            return direction + torch.where(number[:, None], scale * value.asinh()[:, None], self.no_number)
