"""The outcome head: a patient's sets pooled over time and, beside them, its variables (design §7.5).

Over time, softmax of h·z weighs the contexts of sets.  Across time, the events of each variable are pooled with the
context of their sets, joined by facts about its course (``model.features``), and the variables of a patient attend
to one
another: the course of one variable is then one vector, as it is one group of features to a tree (compare the Bi-Axial
Transformer, arXiv:2508.12418, and the FT-Transformer's tokens, arXiv:2106.11959).  The same facts reach the last layers
by a shorter way too, added up over the patient's variables: a dense layer on all facts, which learns in few steps.  The
last layers are an ensemble (compare TabM, arXiv:2410.24210): each member is trained on its own, their mean predicts.

Shape suffixes: B patients, S sets, R rows of the set layout, V (patient, variable) pairs that occur, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import ISAB
from model.config import SeqSetVAEConfig
from model.events import has_number
from model.features import NUM_FACTS, course_facts
from model.noise import Noise, PatientNoise
from model.ragged import SetLayout
from model.segments import attention_pool
from model.sequence import SequenceLayout
from pipeline.loading.batch import PatientBatch


@dataclass(frozen=True, slots=True)
class VariableLayout:
    """Which variables occur in each patient.

    Attributes:
        pair: [E] int64, the pair of patient and variable of each event.
        patient, code: [V] int64, of each pair; pairs stand patient by patient, codes ascending.
        layout: of the pairs, a patient's variables as one set.
    """

    pair: Tensor
    patient: Tensor
    code: Tensor
    layout: SetLayout

    @classmethod
    def build(cls, batch: PatientBatch) -> VariableLayout:
        """From a batch on the CPU: how many pairs there are decides shapes."""
        patient_S = torch.repeat_interleave(torch.arange(batch.num_patients), batch.sets_per_patient)
        patient_E = torch.repeat_interleave(patient_S, batch.set_sizes)
        num_codes = int(batch.code.max()) + 1 if batch.num_events else 1
        key, pair_E = torch.unique(patient_E * num_codes + batch.code, return_inverse=True)
        patient = key // num_codes
        counts = torch.bincount(patient, minlength=batch.num_patients)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(pair_E, patient, key % num_codes, SetLayout.build(offsets))

    def to(self, device: torch.device | str) -> VariableLayout:
        pair, patient = self.pair.to(device, non_blocking=True), self.patient.to(device, non_blocking=True)
        return VariableLayout(pair, patient, self.code.to(device, non_blocking=True), self.layout.to(device))


AXIS_SALT, MEMBER_SALT = 2, 1024
"""Of dropout; members' salts are the even numbers from theirs, and the odd ones after them."""

FACT_CHANNELS = 64
"""Channels that the facts about a variable's course reach."""

ENCODED_FACTS = 2 * NUM_FACTS
"""Numbers that facts are encoded as: a z-score and its cosine each."""

SUMMARY_CHANNELS = 32
"""Channels of a member's summary."""

SUMMARY_WEIGHTS = 1 << 22
"""Weights of all members' summaries: those of 30,000 codes, each with all channels, would be 84 million."""


class VariableAxis(nn.Module):
    """Events with the context of their sets, pooled per variable, and facts about its course; variables attend to one
    another; their mean.
    """

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        width = config.width
        self.event = nn.Linear(width, width)
        self.context = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, config.heads, bias=False)  # softmax would not see one
        self.variable = nn.Embedding(config.num_codes, width)
        # What a fact means differs between variables, so each has a projection of its own (to some of the channels: of
        # full width, those of 30,000 codes would outweigh the rest of the model).
        channels = min(width, FACT_CHANNELS)
        scale = math.sqrt(ENCODED_FACTS)
        self.facts = nn.Parameter(torch.randn(config.num_codes, ENCODED_FACTS, channels) / scale)
        self.norm = nn.LayerNorm(width)
        self.block = ISAB(width, config.heads, config.set_feed_forward, config.inducing_points)
        self.scale = math.sqrt(width)
        self.dropout = config.dropout

    def forward(
        self,
        events_RD: Tensor,
        context_SD: Tensor,
        facts_VF: Tensor,
        sets: SetLayout,
        variables: VariableLayout,
        noise: Noise | None,
    ) -> Tensor:
        """Events [R, D], the contexts of sets [S, D] in the batch's order, facts of pairs [V, F] -> [B, D]; ``noise``
        has a row a pair.
        """
        context_SD = self.context(context_SD)[sets.set_order]
        rows_RD = F.gelu(self.event(events_RD * self.scale) + context_SD[sets.set_of_row])
        score_RH = self.score(rows_RD).float().masked_fill(sets.real_row[:, None] == 0, -torch.inf)
        heads, pair_R = rows_RD.chunk(score_RH.shape[1], dim=1), variables.pair[sets.event_of_row]
        pooled_VD = torch.cat(
            [
                attention_pool(values, score, pair_R, len(variables.code))
                for values, score in zip(heads, score_RH.unbind(1), strict=True)
            ],
            dim=1,
        )
        told_VC = (facts_VF[:, None] @ self.facts[variables.code])[:, 0]
        pooled_VD = pooled_VD + F.pad(told_VC, (0, pooled_VD.shape[1] - told_VC.shape[1]))
        pooled_VD = self.norm(pooled_VD + self.variable(variables.code))
        if noise is not None:
            pooled_VD = noise.dropout(pooled_VD, AXIS_SALT, self.dropout)
        x = pooled_VD[variables.layout.event_of_row]
        x = x + self.block(x, variables.layout)
        return variables.layout.mean(x)[variables.layout.set_rank]


class Member(nn.Module):
    """One of the ensemble that a head ends in: two layers on what the axes give and on a summary of its own.

    The summary is one dense layer over the facts of all variables of a patient, to which a variable that did not occur
    adds nothing; one more fact of each says that it occurs.
    """

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        inputs, width = (2 if config.variable_axis else 1) * config.width, config.width
        self.facts = None
        if config.variable_axis:
            affordable = SUMMARY_WEIGHTS // (config.num_codes * (ENCODED_FACTS + 1) * config.members)
            channels = max(1, min(width, SUMMARY_CHANNELS, affordable))
            scale = math.sqrt(config.num_codes * (NUM_FACTS + 1))  # without cosines, as all forms were compared
            self.facts = nn.Parameter(torch.randn(config.num_codes, ENCODED_FACTS + 1, channels) / scale)
            self.bias = nn.Parameter(torch.zeros(channels))
            inputs += channels
        self.hidden = nn.Linear(inputs, width)
        self.output = nn.Linear(width, 2)
        self.dropout = config.dropout

    def forward(
        self,
        pooled_BD: Tensor,
        facts_VF: Tensor | None,
        variables: VariableLayout,
        noise: PatientNoise | None,
        salt: int,
    ) -> Tensor:
        """[B, 2]; ``salt`` and the next one are the member's own."""
        if self.facts is not None and facts_VF is not None:
            if noise is not None:
                pair_noise = noise.at(variables.patient, variables.code)
                facts_VF = pair_noise.dropout(facts_VF, salt, self.dropout)
            told_VC = (F.pad(facts_VF, (0, 1), value=1.0)[:, None] @ self.facts[variables.code])[:, 0]
            bias_BC = self.bias.repeat(len(pooled_BD), 1)
            summary_BC = F.gelu(bias_BC.index_add(0, variables.patient, told_VC.float()))
            pooled_BD = torch.cat([pooled_BD, summary_BC.to(pooled_BD.dtype)], dim=1)
        if noise is not None:
            pooled_BD = noise.of_patients().dropout(pooled_BD, salt + 1, self.dropout)
        return self.output(F.gelu(self.hidden(pooled_BD)))


class OutcomeHead(nn.Module):
    """Contexts, latents and events -> logits [B, K, 2] of an ensemble of K members, which share all but their ends."""

    fact_mean: Tensor
    fact_std: Tensor

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.variables = VariableAxis(config) if config.variable_axis else None
        # Moments of the train split, see ``fit_facts``.
        self.register_buffer("fact_mean", torch.zeros(config.num_codes, NUM_FACTS))
        self.register_buffer("fact_std", torch.ones(config.num_codes, NUM_FACTS))
        axes = 2 if config.variable_axis else 1
        self.norm = nn.LayerNorm(axes * config.width)
        self.members = nn.ModuleList(Member(config) for _ in range(config.members))

    def forward(
        self,
        batch: PatientBatch,
        events_RD: Tensor,
        context_SD: Tensor,
        z_SD: Tensor,
        sets: SetLayout,
        sequences: SequenceLayout,
        variables: VariableLayout,
        noise: PatientNoise | None,
    ) -> Tensor:
        score_S = (context_SD.float() * z_SD.float()).sum(1) / math.sqrt(context_SD.shape[1])
        pooled_BD = attention_pool(context_SD, score_S, sequences.patient, sequences.num_patients)
        facts_VF = None
        if self.variables is not None:
            pair_noise = None if noise is None else noise.at(variables.patient, variables.code)
            facts_VF = self.encoded(_facts(batch, variables), variables.code)
            axis_BD = self.variables(events_RD, context_SD, facts_VF, sets, variables, pair_noise)
            pooled_BD = torch.cat([pooled_BD, axis_BD.to(pooled_BD.dtype)], dim=1)
        pooled_BD = self.norm(pooled_BD)
        members = [
            member(pooled_BD, facts_VF, variables, noise, MEMBER_SALT + 2 * number)
            for number, member in enumerate(self.members)
        ]
        return torch.stack(members, dim=1)

    def encoded(self, facts_VF: Tensor, code_V: Tensor) -> Tensor:
        """[V, 2 F]: facts as z-scores within their variable, 4 at most, so that a record's error is not the whole sum;
        and the z-scores' cosines, which say how usual each is.

        What is too high and what is too low are often signs of the same, which no dense layer on z-scores sees
        (periodic encodings of numbers: Gorishniy et al., arXiv:2203.05556).
        """
        z_VF = ((facts_VF - self.fact_mean[code_V]) / self.fact_std[code_V]).clamp(-4, 4)
        return torch.cat([z_VF, z_VF.cos()], dim=1)

    @torch.no_grad()
    def fit_facts(self, moments_3CF: Tensor) -> None:
        """Take mean and standard deviation from the sums of :func:`fact_moments` over the train split."""
        count, total, square = moments_3CF.unbind()
        mean = total / count.clamp_min(1)
        std = (square / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        self.fact_mean.copy_(mean)
        self.fact_std.copy_(torch.where(std > SMALLEST_STD, std, 1.0))


SMALLEST_STD = 1e-3
"""A fact that varies less in the train split is a constant, and left on its scale."""


def fact_moments(batch: PatientBatch, num_codes: int) -> Tensor:
    """[3, C, F] float64, on the CPU: of each variable's facts the count, sum and sum of squares over the patients."""
    variables = VariableLayout.build(batch)
    facts_VF = _facts(batch, variables).double()
    parts = torch.stack([torch.ones_like(facts_VF), facts_VF, facts_VF.square()])
    return parts.new_zeros(3, num_codes, NUM_FACTS).index_add(1, variables.code, parts)


def _facts(batch: PatientBatch, variables: VariableLayout) -> Tensor:
    set_E = torch.repeat_interleave(batch.set_sizes, output_size=batch.num_events)
    end_V = batch.minute[batch.patient_offsets[1:] - 1][variables.patient]
    number_E = has_number(batch.code, batch.has_value)
    return course_facts(batch.value, number_E, set_E, variables.pair, batch.minute, end_V)
