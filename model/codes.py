"""Linear maps of which each code has its own, for vocabularies of a few codes and of tens of thousands.

Shape suffixes: V (patient, variable) pairs that occur, B patients, U codes that occur, E width of their embeddings, G
maps side by side, F inputs, O outputs, R factors, P places for the pairs of a code, I inputs of all codes (U × F).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import SeqSetVAEConfig
from model.prepared import PreparedBatch
from model.segments import put_unique, sum_rows, take_unique

MAX_OWN_CODES = 256
"""Codes up to which each learns weights of its own, which predicts a little better where there are few (docs/model.md);
at 30,000 they would be 99 % of all parameters, and every step would walk through them."""

CODE_FACTORS = 32
"""Numbers R that a code's weights are made of where there are more codes: a projection of its embedding."""


def has_factors(config: SeqSetVAEConfig) -> bool:
    """Return whether the weights of codes are made of factors."""
    return config.num_codes > MAX_OWN_CODES


class CodeFactors(nn.Linear):
    """The factors of codes, a linear map of their unit embeddings."""

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__(config.embedding_dim, CODE_FACTORS, bias=False)
        nn.init.normal_(self.weight)

    def forward(self, embedding_UE: Tensor) -> Tensor:
        """Return [U, R]."""
        return super().forward(F.normalize(embedding_UE, dim=1))


class CodeLinear(nn.Module):
    """G linear maps [V, G, inputs] -> [V, G, outputs] without bias, whose weights W_c depend on the code of the pair.

    Few codes have weights of their own; of more, ``W_c = Σ_r u_cr B_r`` with factors u_c and matrices B that all share.

    Args:
        config: of the model.
        maps: G.
        inputs, outputs: of each map.
        fan_in: what the squares of the initial weights of an output sum up to one over.
    """

    def __init__(self, config: SeqSetVAEConfig, maps: int, inputs: int, outputs: int, *, fan_in: float) -> None:
        super().__init__()
        self.is_factored = has_factors(config)
        shape: tuple[int, ...] = config.num_codes, maps, inputs, outputs
        if self.is_factored:
            shape, fan_in = (maps, inputs * CODE_FACTORS, outputs), fan_in * CODE_FACTORS
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(fan_in))

    def forward(self, x_VGF: Tensor, factors_VR: Tensor | None, prepared: PreparedBatch) -> Tensor:
        """Return [V, G, outputs]; ``factors_VR`` are those of the code of each pair, None where codes have none."""
        if factors_VR is None:
            # The pairs of a code share a product: weights gathered for each pair take five times as long.
            weight_UGFO = take_unique(self.weight, prepared.codes)
            codes, pairs = len(prepared.codes), prepared.max_pairs
            x_UPGF = put_unique(x_VGF, prepared.cell_of_pair, codes * pairs).unflatten(0, (codes, pairs))
            y_UGPO = x_UPGF.transpose(1, 2) @ weight_UGFO
            return take_unique(y_UGPO.transpose(1, 2).flatten(0, 1), prepared.cell_of_pair)
        return self._join(self._multiply(x_VGF, factors_VR))

    def sum_over_variables(self, x_VGF: Tensor, factors_VR: Tensor | None, prepared: PreparedBatch) -> Tensor:
        """Return [B, G, outputs], the sums of what :meth:`forward` gives the pairs of each patient."""
        if factors_VR is None:
            # A patient's variables side by side make the sum a part of the product, which has a row a patient.
            weight_GIO = take_unique(self.weight, prepared.codes).transpose(0, 1).flatten(1, 2)
            patients, codes = prepared.variables.num_patients, len(prepared.codes)
            cell_V = prepared.variables.patient * codes + prepared.pairs_of_code.of_row
            x_BUGF = put_unique(x_VGF, cell_V, patients * codes).unflatten(0, (patients, codes))
            return (x_BUGF.permute(2, 0, 1, 3).flatten(2) @ weight_GIO).transpose(0, 1)
        # Products are summed up before they meet the weights, which are then met by a row a patient.
        return self._join(sum_rows(self._multiply(x_VGF, factors_VR), prepared.variables.pairs_of_patient))

    def _multiply(self, x_VGF: Tensor, factors_VR: Tensor) -> Tensor:
        return (x_VGF[..., None] * factors_VR[:, None, None]).flatten(2)

    def _join(self, products_VGP: Tensor) -> Tensor:
        return (products_VGP.transpose(0, 1) @ self.weight).transpose(0, 1)
