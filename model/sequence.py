"""The causal transformer over a patient's sets (design §7.3), without work on padded patients.

Dense layers run over the flat sets of all patients.  Only attention needs rectangles; with padding on the right and a
causal mask no real query sees a padded key, so there is no other mask.

Shape suffixes: B patients, S sets, K most sets of a patient, H heads, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import SeqSetVAEConfig
from model.noise import Noise
from model.set_vae import run_block, sinusoids

_SHORTEST_HOURS, _LONGEST_HOURS = 0.5, 24 * 365.25 * 20


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Where the sets of the batch's patients stand in flat order and in the rectangle.

    Attributes:
        num_patients: B.
        most_sets: K.
        patient: [S] int64, the patient of each set.
        place: [S] int64, 0, 1, 2 … within the patient.
    """

    num_patients: int
    most_sets: int
    patient: Tensor
    place: Tensor

    @classmethod
    def build(cls, patient_offsets: Tensor) -> SequenceLayout:
        """From [B+1] int64, which should lie on the CPU: the most sets of a patient decides a shape."""
        num_sets = patient_offsets.diff()
        patient = torch.repeat_interleave(torch.arange(len(num_sets), device=num_sets.device), num_sets)
        place = torch.arange(len(patient), device=num_sets.device) - patient_offsets[patient]
        return cls(len(num_sets), int(num_sets.max()) if len(num_sets) else 0, patient, place)

    def to(self, device: torch.device | str) -> SequenceLayout:
        patient = self.patient.to(device, non_blocking=True)
        return SequenceLayout(self.num_patients, self.most_sets, patient, self.place.to(device, non_blocking=True))


class TimeEncoding(nn.Module):
    """Minutes -> [S, D]: sinusoids of hours, with periods from half an hour to twenty years in equal ratios, and
    asinh of the hours, projected.  Continuous, scaled, and defined for negative and for very late times.
    """

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        periods = torch.logspace(math.log10(_SHORTEST_HOURS), math.log10(_LONGEST_HOURS), frequencies)
        self.angular: Tensor
        self.register_buffer("angular", 2 * math.pi / periods, persistent=False)
        self.project = nn.Linear(2 * frequencies + 1, width)

    def forward(self, minute_S: Tensor) -> Tensor:
        hours = minute_S[:, None] / 60
        angle = hours * self.angular
        return self.project(torch.cat([angle.sin(), angle.cos(), hours.asinh()], dim=1))


class CausalLayer(nn.Module):
    """One pre-norm layer: causal self-attention, then a GELU feed-forward; dropout on what either adds."""

    def __init__(self, config: SeqSetVAEConfig, index: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.index = config.heads, config.dropout, index
        self.norm_attention = nn.LayerNorm(config.width)
        # A key's bias has no effect, and Adam would walk along the rounding noise of its gradient; so there is none.
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width)
        self.norm_feed_forward = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, config.feed_forward)
        self.contract = nn.Linear(config.feed_forward, config.width)

    def forward(self, x_SD: Tensor, layout: SequenceLayout, noise: Noise | None) -> Tensor:
        attended = self.output(self._attend(self.query_key_value(self.norm_attention(x_SD)), layout))
        x_SD = x_SD + self._drop(attended, noise, 2 * self.index)
        fed = self.contract(F.gelu(self.expand(self.norm_feed_forward(x_SD))))
        return x_SD + self._drop(fed, noise, 2 * self.index + 1)

    def _attend(self, qkv_S3D: Tensor, layout: SequenceLayout) -> Tensor:
        B, K, width = layout.num_patients, layout.most_sets, qkv_S3D.shape[1] // 3
        if not B:
            return qkv_S3D[:, :width]
        cell_S = layout.patient * K + layout.place
        padded = qkv_S3D.new_zeros(B * K, 3 * width).index_copy(0, cell_S, qkv_S3D)
        query, key, value = padded.view(B, K, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended_BHKD = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended_BHKD.transpose(1, 2).reshape(B * K, width)[cell_S]

    def _drop(self, x: Tensor, noise: Noise | None, salt: int) -> Tensor:
        return x if noise is None else noise.dropout(x, DROPOUT_SALT + salt, self.dropout)


DROPOUT_SALT = 16
"""Salts of dropout begin here; smaller ones are the sample's and the head's."""


class CausalTransformer(nn.Module):
    """Latents and minutes of sets -> contexts: set k sees sets ≤ k of its own patient and nothing else."""

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.time = TimeEncoding(config.width)
        self.norm_input = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(CausalLayer(config, index) for index in range(config.layers))
        self.norm_output = nn.LayerNorm(config.width)

    def forward(
        self, z_SD: Tensor, minute_S: Tensor, layout: SequenceLayout, noise: Noise | None, *, checkpointed: bool = False
    ) -> Tensor:
        """[S, D] and [S] minutes -> [S, D], flat, in the batch's order."""
        x_SD = self.norm_input(z_SD + sinusoids(layout.place, z_SD.shape[1]) + self.time(minute_S))
        for layer in self.layers:
            x_SD = run_block(layer, x_SD, layout, noise, checkpointed=checkpointed)
        return self.norm_output(x_SD)
