"""The causal transformer over a patient's sets (design §7.3), without work on padded patients.

Dense layers run over the flat sets of all patients.  Only attention needs rectangles: patients with like numbers of
sets share one, so that one long history does not widen the others' rows; with padding on the right and a causal mask no
real query sees a padded key, so there is no other mask.

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

FULL_ENOUGH = 0.75
"""A patient joins a rectangle of which its sets fill more than this share of a row."""

_SHORTEST_HOURS, _LONGEST_HOURS = 0.5, 24 * 365.25 * 20


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Where the sets of the batch's patients stand in flat order and in the rectangles.

    Attributes:
        num_patients: B.
        rectangles: (patients, most sets of one) of each, those with the most sets first.
        patient: [S] int64, the patient of each set.
        place: [S] int64, 0, 1, 2 … within the patient.
        cell: [S] int64, the place of each set among the cells of all rectangles, row by row.
    """

    num_patients: int
    rectangles: tuple[tuple[int, int], ...]
    patient: Tensor
    place: Tensor
    cell: Tensor

    @classmethod
    def build(cls, patient_offsets: Tensor) -> SequenceLayout:
        """From [B+1] int64, which should lie on the CPU: numbers of sets decide shapes."""
        num_sets = patient_offsets.diff()
        patient = torch.repeat_interleave(torch.arange(len(num_sets), device=num_sets.device), num_sets)
        place = torch.arange(len(patient), device=num_sets.device) - patient_offsets[patient]

        ranked, order = num_sets.sort(descending=True, stable=True)
        rectangles: list[tuple[int, int]] = []
        for size in ranked[ranked > 0].tolist():
            count, most = rectangles.pop() if rectangles else (0, size)
            full = size > FULL_ENOUGH * most
            rectangles += [(count + 1, most)] if full else [(count, most), (1, size)]
        width = torch.tensor([most for count, most in rectangles for _ in range(count)], dtype=torch.int64)
        first_cell = torch.zeros_like(num_sets)
        first_cell[order[: len(width)]] = width.cumsum(0) - width
        return cls(len(num_sets), tuple(rectangles), patient, place, first_cell[patient] + place)

    def to(self, device: torch.device | str) -> SequenceLayout:
        patient, place, cell = (t.to(device, non_blocking=True) for t in (self.patient, self.place, self.cell))
        return SequenceLayout(self.num_patients, self.rectangles, patient, place, cell)


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
        sizes = [count * most for count, most in layout.rectangles]
        cells_3D = qkv_S3D.new_zeros(sum(sizes), qkv_S3D.shape[1]).index_copy(0, layout.cell, qkv_S3D)
        attended = [qkv_S3D[:0].chunk(3, dim=1)[0]]
        for (count, most), cells in zip(layout.rectangles, cells_3D.split(sizes), strict=True):
            query, key, value = cells.view(count, most, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended_BHKD = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            attended.append(attended_BHKD.transpose(1, 2).reshape(count * most, -1))
        return torch.cat(attended)[layout.cell]

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
