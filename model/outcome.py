"""The outcome head: pools the sets of a patient over time and also its variables (docs/model.md §5).

Over time, softmax of h·z weights the contexts of sets.  Across time, the events of each variable are pooled with the
context of their sets and joined by the variable's summary features (:mod:`model.features`), and the variables of a
patient attend to one another: a variable is then one vector, as it is one group of features to a tree (compare the
Bi-Axial Transformer, arXiv:2508.12418, and the FT-Transformer's tokens, arXiv:2106.11959).  The same features reach the
last layers by a shorter way too, a dense layer over the features of all variables, which learns in few steps.  The
last layers are an ensemble (compare TabM, arXiv:2410.24210): each ensemble head is trained on its own, their mean
probability predicts.  Where a model has several outcomes, each has an ensemble of its own.  In evaluation boosted trees
on the same features have a share in the logit of each head, where there are some (:mod:`model.trees`).

Shape suffixes: B patients, S sets, R slots of the set layout or factors of a code, V (patient, variable) pairs that
occur, U codes that occur, C all codes or the classes of an outcome, E width of their embeddings, D width, F features,
K ensemble heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import ISAB, NOT_FOLDED, Folded
from model.codes import CodeFactors, CodeLinear, has_factors
from model.config import SeqSetVAEConfig
from model.features import NUM_FEATURES, VariableLayout, summary_features
from model.noise import StepNoise
from model.prepared import PreparedBatch
from model.segments import attention_pool, pool_prefixes, take_rows
from model.set_vae import run_block
from model.trees import BoostedTrees
from pipeline.loading.batch import PatientBatch

AXIS_SALT, ENSEMBLE_SALT = 2, 1024
"""Salts of dropout; each ensemble takes one for its summaries and the one after for what it joins them with."""

FEATURE_CHANNELS = 64
"""Channels of a variable's vector that its summary features reach."""

ENCODED_FEATURES = 2 * NUM_FEATURES
"""Numbers that encode the summary features of a variable: a z-score and its cosine for each."""

SUMMARY_CHANNELS = 32
"""Channels of an ensemble head's summary of all variables."""

USUAL_VARIABLES = 64
"""Number of variables from which on summaries begin no smaller; a patient seldom has more."""

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
        self.variable = CodeLinear(config, 1, 1, width, fan_in=1)
        # A feature means something else for each variable, so each has a projection of its own.
        channels = min(width, FEATURE_CHANNELS)
        self.features = None
        if config.summary_features:
            self.features = CodeLinear(config, 1, ENCODED_FEATURES, channels, fan_in=ENCODED_FEATURES)
        self.norm = nn.LayerNorm(width)
        self.block = ISAB(width, config.heads, config.set_feed_forward, config.inducing_points)
        self.scale = math.sqrt(width)
        self.dropout = config.dropout

    def forward(
        self,
        prepared: PreparedBatch,
        factors_VR: Tensor | None,
        events_RD: Tensor,
        context_SD: Tensor,
        features_VF: Tensor,
        noise: StepNoise | None,
        folded: Folded,
        *,
        checkpointed: bool,
    ) -> Tensor:
        """Return [B, D] from events, the contexts of sets in the batch's order, and encoded features of pairs."""
        sets, variables = prepared.sets, prepared.variables
        context_SD = sets.sort_sets(self.context(context_SD))
        x_RD = F.gelu(self.event(events_RD * self.scale) + take_rows(context_SD, sets.slots))
        score_RH = self.score(x_RD).float()
        if prepared.shared is not None:
            pooled_VD = pool_prefixes(x_RD, score_RH, prepared.shared.events)
        else:
            assert prepared.slots_of_pair is not None
            score_RH = score_RH.masked_fill(~sets.mask[:, None], -torch.inf)
            pooled_VD = attention_pool(x_RD, score_RH, prepared.slots_of_pair)
        own = factors_VR, prepared
        if self.features is not None:
            projected_VD = run_block(self.features, features_VF[:, None], *own, checkpointed=checkpointed)[:, 0]
            pooled_VD = pooled_VD + F.pad(projected_VD, (0, pooled_VD.shape[1] - projected_VD.shape[1]))
        pooled_VD = self.norm(pooled_VD + self.variable(torch.ones_like(features_VF[:, None, :1]), *own)[:, 0])
        if noise is not None:
            pooled_VD = noise.pair.dropout(pooled_VD, AXIS_SALT, self.dropout)
        x = take_rows(pooled_VD, prepared.slots_of_variable)
        x = x + run_block(self.block, x, variables.layout, folded.get(self.block), checkpointed=checkpointed)
        return variables.layout.unsort_sets(variables.layout.mean(x))


class Ensemble(nn.Module):
    """The ensemble of an outcome, K heads in one product: each two layers on the pooled patient and on a summary of its
    own.

    The summary is a dense layer over the features of all variables of a patient and, for each variable, a 1 that says
    that it occurs; a variable that does not occur adds nothing.
    """

    def __init__(self, config: SeqSetVAEConfig, number: int) -> None:
        super().__init__()
        heads, width = config.ensemble_heads, config.width
        self.salt = ENSEMBLE_SALT + 2 * number
        inputs = (2 if config.variable_axis else 1) * width
        self.heads, self.dropout, self.summary = heads, config.dropout, None
        if config.summary_features:
            channels = min(width, SUMMARY_CHANNELS)
            usual = min(config.num_codes, USUAL_VARIABLES)
            fan_in = usual * (NUM_FEATURES + 1)  # of the z-scores alone, as it was measured
            self.summary = CodeLinear(config, heads, ENCODED_FEATURES + 1, channels, fan_in=fan_in)
            self.summary_bias = nn.Parameter(torch.zeros(heads, channels))
            inputs += channels
        self.hidden, self.hidden_bias = _dense_layers(heads, inputs, width)
        self.output, self.output_bias = _dense_layers(heads, width, config.outcomes[number].num_outputs)

    def forward(
        self,
        prepared: PreparedBatch,
        factors_VR: Tensor | None,
        pooled_BD: Tensor,
        features_VF: Tensor | None,
        noise: StepNoise | None,
    ) -> Tensor:
        """Return logits [B, K, C]."""
        x_BKD = pooled_BD[:, None].expand(-1, self.heads, -1)
        if self.summary is not None and features_VF is not None:
            features_VF = features_VF.repeat(1, self.heads)
            if noise is not None:
                features_VF = noise.pair.dropout(features_VF, self.salt, self.dropout)
            features_VKF = F.pad(features_VF.unflatten(1, (self.heads, -1)), (0, 1), value=1.0)
            summary_BKC = self.summary.sum_over_variables(features_VKF, factors_VR, prepared) + self.summary_bias
            x_BKD = torch.cat([x_BKD, F.gelu(summary_BKC).to(x_BKD.dtype)], dim=2)
        if noise is not None:
            x_BKD = noise.patient.dropout(x_BKD.flatten(1), self.salt + 1, self.dropout).view(x_BKD.shape)
        hidden_KBD = F.gelu(torch.baddbmm(self.hidden_bias[:, None], x_BKD.transpose(0, 1), self.hidden))
        return torch.baddbmm(self.output_bias[:, None], hidden_KBD, self.output).transpose(0, 1)


def _dense_layers(heads: int, inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weights [heads, inputs, outputs] and biases [heads, outputs], as ``nn.Linear`` begins with them."""
    bound = 1 / math.sqrt(inputs)
    shapes = (heads, inputs, outputs), (heads, outputs)
    weight, bias = (nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes)
    return weight, bias


class OutcomeHead(nn.Module):
    """Predict the outcomes of a patient: for each the logits [B, K, C] of an ensemble; all share what is pooled."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.variables = VariableAxis(config) if config.variable_axis else None
        self.register_buffer("feature_mean", torch.zeros(config.num_codes, NUM_FEATURES))
        self.register_buffer("feature_std", torch.ones(config.num_codes, NUM_FEATURES))
        axes = 2 if config.variable_axis else 1
        self.norm = nn.LayerNorm(axes * config.width)
        self.ensembles = nn.ModuleList(Ensemble(config, number) for number in range(len(config.outcomes)))
        self.sees_contexts = config.without != "contexts"
        self.factors = CodeFactors(config) if config.variable_axis and has_factors(config) else None
        self.trees = BoostedTrees(config.num_codes) if config.tree_share else None
        self.tree_share = config.tree_share

    def forward(
        self,
        prepared: PreparedBatch,
        embedding_UE: Tensor,
        events_RD: Tensor,
        context_SD: Tensor,
        z_SD: Tensor,
        noise: StepNoise | None,
        folded: Folded = NOT_FOLDED,
        *,
        checkpointed: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return the logits [B, K, C] of each outcome; B are the samples, where these share patients.

        Args:
            prepared: the batch.
            embedding_UE: the embeddings of the codes that occur.
            events_RD: its encoded events.
            context_SD: the contexts of its sets, in the batch's order.
            z_SD: their latents.
            noise: the noise of dropout; None = no dropout.
            folded: projections of blocks.
            checkpointed: whether activations are computed again for the gradient.
        """
        variables = prepared.variables
        if not self.sees_contexts:
            context_SD = torch.zeros_like(context_SD)
        score_S1 = (context_SD.float() * z_SD.float()).sum(1, keepdim=True) / math.sqrt(context_SD.shape[1])
        pooled_BD = self._pool_sets(prepared, context_SD, score_S1)
        features_VF, factors_VR = None, None
        if self.variables is not None:
            features_VF = self.encode_features(prepared.features, variables.code)
            if self.factors is not None:
                factors_VR = take_rows(self.factors(embedding_UE), prepared.pairs_of_code)
            axis_BD = self.variables(
                prepared, factors_VR, events_RD, context_SD, features_VF, noise, folded, checkpointed=checkpointed
            )
            pooled_BD = torch.cat([pooled_BD, axis_BD.to(pooled_BD.dtype)], dim=1)
        pooled_BD = self.norm(pooled_BD)
        logits = tuple(ensemble(prepared, factors_VR, pooled_BD, features_VF, noise) for ensemble in self.ensembles)
        if self.trees is None or noise is not None:  # ensemble heads learn by themselves
            return logits
        odds_B = self.trees(prepared.features, variables)
        of_trees_B1C = torch.stack([-odds_B / 2, odds_B / 2], 1)[:, None]
        return (torch.lerp(logits[0].float(), of_trees_B1C, self.tree_share),)

    @staticmethod
    def _pool_sets(prepared: PreparedBatch, context_SD: Tensor, score_S1: Tensor) -> Tensor:
        """Return [B, D], the contexts of each sample's sets, pooled over time."""
        if (shared := prepared.shared) is None:
            return attention_pool(context_SD, score_S1, prepared.sequences.sets_of_patient)
        return pool_prefixes(context_SD, score_S1, shared.sets)

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
