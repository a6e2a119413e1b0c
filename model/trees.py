"""Boosted trees on the summary features of a sample's variables, as buffers of the model (docs/model.md §5).

A tree asks whether a number is beyond a threshold, and what it answers jumps there; layers of a network answer
smoothly, and on tables of clinical variables each sees what the other does not (Grinsztajn et al. 2022,
arXiv:2207.08815).  The trees are fitted once, before training, and no gradient reaches them.

Shape suffixes: B samples, V (sample, variable) pairs that occur, F summary features, X features of all variables that
the trees read, T trees, N nodes of a tree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.features import NUM_FEATURES, VariableLayout

NUM_TREES, DEPTH = 400, 3

MAX_VARIABLES = 64
"""Most variables that trees read."""

STEPS_PER_UNIT = 1024
"""Features are rounded to 1/1024: a feature that is summed in another order, and differs in its last bits, must not go
the other way where two patients of training differed by as little.
"""

ABSENT = 1024.0
"""Beyond every feature: those are asinh or log of float32 numbers."""


class BoostedTrees(nn.Module):
    """The log-odds of a binary outcome, a sum over complete binary trees.

    Node n asks whether its feature is at most its threshold, and leads to node 2 n + 1 if so, to 2 n + 2 if not.

    Args:
        num_codes: number of codes.
    """

    place: Tensor
    feature: Tensor
    threshold: Tensor
    answer: Tensor
    bias: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.num_variables, inner = min(num_codes, MAX_VARIABLES), 2**DEPTH - 1
        # The place of each code among the variables that are read; what is not read goes behind them.
        self.register_buffer("place", torch.full((num_codes,), self.num_variables))
        self.register_buffer("feature", torch.zeros(NUM_TREES, inner, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((NUM_TREES, inner), ABSENT))
        self.register_buffer("answer", torch.zeros(NUM_TREES, inner + 1))
        self.register_buffer("bias", torch.zeros(()))

    def tabulate(self, features_VF: Tensor, variables: VariableLayout) -> Tensor:
        """Return [B, X] float32, the features of all variables that are read, twice: those of a variable that does not
        occur are less than any other in the first half, and greater in the second.  So a tree can put the samples
        without it on either side of a threshold.
        """
        rounded_VF = (features_VF.float() * STEPS_PER_UNIT).round() / STEPS_PER_UNIT
        cell_V = variables.patient, self.place[variables.code]
        shape = variables.num_patients, self.num_variables + 1, NUM_FEATURES
        halves = (rounded_VF.new_full(shape, fill).index_put(cell_V, rounded_VF) for fill in (-ABSENT, ABSENT))
        return torch.cat([half[:, :-1].flatten(1) for half in halves], 1)

    def forward(self, features_VF: Tensor, variables: VariableLayout) -> Tensor:
        """Return the log-odds [B] float32 of each sample."""
        table_XB = self.tabulate(features_VF, variables).T
        feature_TNB = table_XB[self.feature.flatten()].view(*self.feature.shape, table_XB.shape[1])
        is_beyond_TNB = feature_TNB > self.threshold[..., None]
        answer_TNB = self.answer[..., None]
        for depth in reversed(range(DEPTH)):  # from the leaves up, each node passes on the answer of one child
            nodes = slice(2**depth - 1, 2 ** (depth + 1) - 1)
            answer_TNB = torch.where(is_beyond_TNB[:, nodes], answer_TNB[:, 1::2], answer_TNB[:, ::2])
        return self.bias + answer_TNB.sum((0, 1))
