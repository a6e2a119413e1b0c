"""The outcome head: pools the sets of a patient over time and also its variables (docs/model.md §5).

Over time, softmax of h·z weights the contexts of sets.  Across time, the events of each variable are pooled with the
context of their sets and joined by the variable's summary features (:mod:`model.features`), and the variables of a
patient attend to one another: a variable is then one vector, as it is one group of features to a tree (compare the
Bi-Axial Transformer, arXiv:2508.12418, and the FT-Transformer's tokens, arXiv:2106.11959).  The same features reach the
last layers by a shorter way too, a dense layer over the features of all variables, which learns in few steps.  The
last layers are an ensemble (compare TabM, arXiv:2410.24210): each ensemble head is trained on its own, their mean
probability predicts.

Shape suffixes: B patients, S sets, R slots of the set layout, V (patient, variable) pairs that occur, C codes, D width,
F features, K ensemble heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import ISAB
from model.config import SeqSetVAEConfig
from model.features import NUM_FEATURES, VariableLayout, summary_features
from model.noise import StepNoise
from model.prepared import PreparedBatch
from model.segments import attention_pool
from pipeline.loading.batch import PatientBatch

AXIS_SALT, ENSEMBLE_SALT = 2, 1024
"""Salts of dropout; ensemble head k takes ENSEMBLE_SALT + 2 k and the one after."""

FEATURE_CHANNELS = 64
"""Channels of a variable's vector that its summary features reach."""

ENCODED_FEATURES = 2 * NUM_FEATURES
"""Numbers that encode the summary features of a variable: a z-score and its cosine for each."""

SUMMARY_CHANNELS = 32
"""Channels of an ensemble head's summary of all variables."""

MAX_SUMMARY_WEIGHTS = 1 << 22
"""Maximum number of weights of all summaries: for 30,000 codes full ones would have 84 million."""

MIN_STD = 1e-3
"""A feature that varies less in the train split is constant, and is not scaled."""


class VariableAxis(nn.Module):
    """Pool events with the contexts of their sets per variable, let the variables of a patient attend to one another,
    and average them.
    """

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        width = config.width
        self.event = nn.Linear(width, width)
        self.context = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, config.heads, bias=False)  # a bias has no effect on a softmax
        self.variable = nn.Embedding(config.num_codes, width)
        # A feature means something else for each variable, so each has a projection of its own; to some of the channels
        # only, because projections to all channels would outweigh the rest of the model where there are 30,000 codes.
        channels = min(width, FEATURE_CHANNELS)
        scale = math.sqrt(ENCODED_FEATURES)
        self.features = nn.Parameter(torch.randn(config.num_codes, ENCODED_FEATURES, channels) / scale)
        self.norm = nn.LayerNorm(width)
        self.block = ISAB(width, config.heads, config.set_feed_forward, config.inducing_points)
        self.scale = math.sqrt(width)
        self.dropout = config.dropout

    def forward(
        self,
        prepared: PreparedBatch,
        events_RD: Tensor,
        context_SD: Tensor,
        features_VF: Tensor,
        noise: StepNoise | None,
    ) -> Tensor:
        """Return [B, D] from events, the contexts of sets in the batch's order, and encoded features of pairs."""
        sets, variables = prepared.sets, prepared.variables
        context_SD = self.context(context_SD)[sets.set_order]
        x_RD = F.gelu(self.event(events_RD * self.scale) + context_SD[sets.set_of_slot])
        score_RH = self.score(x_RD).float().masked_fill(~sets.mask[:, None], -torch.inf)
        heads, pair_R = x_RD.chunk(score_RH.shape[1], dim=1), variables.pair[sets.event_of_slot]
        parts = zip(heads, score_RH.unbind(1), strict=True)
        pooled_VD = torch.cat([attention_pool(x, score, pair_R, len(variables.code)) for x, score in parts], dim=1)
        projected_VD = (features_VF[:, None] @ self.features[variables.code])[:, 0]
        pooled_VD = pooled_VD + F.pad(projected_VD, (0, pooled_VD.shape[1] - projected_VD.shape[1]))
        pooled_VD = self.norm(pooled_VD + self.variable(variables.code))
        if noise is not None:
            pooled_VD = noise.pair.dropout(pooled_VD, AXIS_SALT, self.dropout)
        x = pooled_VD[variables.layout.event_of_slot]
        x = x + self.block(x, variables.layout)
        return variables.layout.mean(x)[variables.layout.set_rank]


class EnsembleHead(nn.Module):
    """One ensemble head: two layers on the pooled patient and on a summary of its own.

    The summary is a dense layer over the features of all variables of a patient and, for each variable, a 1 that says
    that it occurs; a variable that does not occur adds nothing.
    """

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        inputs, width = (2 if config.variable_axis else 1) * config.width, config.width
        self.summary = None
        if config.variable_axis:
            affordable = MAX_SUMMARY_WEIGHTS // (config.num_codes * (ENCODED_FEATURES + 1) * config.ensemble_heads)
            channels = max(1, min(width, SUMMARY_CHANNELS, affordable))
            scale = math.sqrt(config.num_codes * (NUM_FEATURES + 1))  # of the z-scores alone, as it was measured
            self.summary = nn.Parameter(torch.randn(config.num_codes, ENCODED_FEATURES + 1, channels) / scale)
            self.summary_bias = nn.Parameter(torch.zeros(channels))
            inputs += channels
        self.hidden = nn.Linear(inputs, width)
        self.output = nn.Linear(width, 2)
        self.dropout = config.dropout

    def forward(
        self,
        pooled_BD: Tensor,
        features_VF: Tensor | None,
        variables: VariableLayout,
        noise: StepNoise | None,
        salt: int,
    ) -> Tensor:
        """Return logits [B, 2]; ``salt`` and the one after it are this head's own."""
        if self.summary is not None and features_VF is not None:
            if noise is not None:
                features_VF = noise.pair.dropout(features_VF, salt, self.dropout)
            summary_VC = (F.pad(features_VF, (0, 1), value=1.0)[:, None] @ self.summary[variables.code])[:, 0]
            bias_BC = self.summary_bias.repeat(len(pooled_BD), 1)
            summary_BC = F.gelu(bias_BC.index_add(0, variables.patient, summary_VC.float()))
            pooled_BD = torch.cat([pooled_BD, summary_BC.to(pooled_BD.dtype)], dim=1)
        if noise is not None:
            pooled_BD = noise.patient.dropout(pooled_BD, salt + 1, self.dropout)
        return self.output(F.gelu(self.hidden(pooled_BD)))


class OutcomeHead(nn.Module):
    """Predict the outcome of a patient: logits [B, K, 2] of K ensemble heads, which share what they pool."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.variables = VariableAxis(config) if config.variable_axis else None
        self.register_buffer("feature_mean", torch.zeros(config.num_codes, NUM_FEATURES))
        self.register_buffer("feature_std", torch.ones(config.num_codes, NUM_FEATURES))
        axes = 2 if config.variable_axis else 1
        self.norm = nn.LayerNorm(axes * config.width)
        self.ensemble = nn.ModuleList(EnsembleHead(config) for _ in range(config.ensemble_heads))

    def forward(
        self, prepared: PreparedBatch, events_RD: Tensor, context_SD: Tensor, z_SD: Tensor, noise: StepNoise | None
    ) -> Tensor:
        """Return logits [B, K, 2].

        Args:
            prepared: the batch.
            events_RD: its encoded events.
            context_SD: the contexts of its sets, in the batch's order.
            z_SD: their latents.
            noise: the noise of dropout; None = no dropout.
        """
        sequences, variables = prepared.sequences, prepared.variables
        score_S = (context_SD.float() * z_SD.float()).sum(1) / math.sqrt(context_SD.shape[1])
        pooled_BD = attention_pool(context_SD, score_S, sequences.patient, sequences.num_patients)
        features_VF = None
        if self.variables is not None:
            features_VF = self.encode_features(prepared.features, variables.code)
            axis_BD = self.variables(prepared, events_RD, context_SD, features_VF, noise)
            pooled_BD = torch.cat([pooled_BD, axis_BD.to(pooled_BD.dtype)], dim=1)
        pooled_BD = self.norm(pooled_BD)
        salts = range(ENSEMBLE_SALT, ENSEMBLE_SALT + 2 * len(self.ensemble), 2)
        heads = zip(self.ensemble, salts, strict=True)
        logits = [head(pooled_BD, features_VF, variables, noise, salt) for head, salt in heads]
        return torch.stack(logits, dim=1)

    def encode_features(self, features_VF: Tensor, code_V: Tensor) -> Tensor:
        """Return [V, 2 F], the features as z-scores within their variable, and the cosines of the z-scores.

        z-scores are clamped to ±4, so that a recording error does not outweigh the rest.  A cosine says how usual a
        value is: what is too high and what is too low are often signs of the same, which no dense layer on z-scores
        sees (periodic encodings of numbers: Gorishniy et al., arXiv:2203.05556).
        """
        z_VF = ((features_VF - self.feature_mean[code_V]) / self.feature_std[code_V]).clamp(-4, 4)
        return torch.cat([z_VF, z_VF.cos()], dim=1)

    @torch.no_grad()
    def fit_features(self, moments_3CF: Tensor) -> None:
        """Set means and standard deviations from the sum of :func:`feature_moments` over the train split."""
        count, total, square = moments_3CF.unbind()
        mean = total / count.clamp_min(1)
        std = (square / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std > MIN_STD, std, 1.0))


def feature_moments(batch: PatientBatch, num_codes: int) -> Tensor:
    """Return [3, C, F] float64, the count, sum and sum of squares over patients of the features of each variable."""
    variables = VariableLayout.build(batch)
    features_VF = summary_features(batch, variables).double()
    parts = torch.stack([torch.ones_like(features_VF), features_VF, features_VF.square()])
    return parts.new_zeros(3, num_codes, NUM_FEATURES).index_add(1, variables.code, parts)
