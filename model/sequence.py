"""The causal transformer over the sets of a patient (docs/model.md §3), without work on padded patients.

Dense layers run over the flat sets of all patients.  Only attention needs rectangles: patients with similar numbers of
sets share one, so that one long history does not widen the rows of the others; with padding on the right and a causal
mask no query of a set sees a padded key, so no other mask is needed.

Shape suffixes: B patients, S sets, K columns of a rectangle, H heads, D width.
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

MIN_FILL = 0.75
"""A patient joins a rectangle if its sets fill more than this fraction of a row."""

DROPOUT_SALT = 16
"""First salt of dropout; smaller ones belong to the sample of the posterior and to the outcome head."""

_SHORTEST_HOURS, _LONGEST_HOURS = 0.5, 24 * 365.25 * 20


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The positions of a batch's sets in their patients and in the rectangles.

    Attributes:
        num_patients: B.
        rectangles: (rows, columns) of each rectangle, the one with most columns first; a row is a patient.
        patient: [S] int64, the patient of each set.
        position: [S] int64, 0, 1, 2 … within the patient.
        cell: [S] int64, the cell of each set among those of all rectangles, row by row.
    """

    num_patients: int
    rectangles: tuple[tuple[int, int], ...]
    patient: Tensor
    position: Tensor
    cell: Tensor

    @classmethod
    def build(cls, patient_offsets: Tensor) -> SequenceLayout:
        """Lay out patients from [B+1] int64 on the CPU: numbers of sets decide shapes."""
        num_sets = patient_offsets.diff()
        patient = torch.repeat_interleave(torch.arange(len(num_sets)), num_sets)
        position = torch.arange(len(patient)) - patient_offsets[patient]

        ranked, order = num_sets.sort(descending=True, stable=True)
        rectangles: list[tuple[int, int]] = []
        for size in ranked[ranked > 0].tolist():
            rows, columns = rectangles.pop() if rectangles else (0, size)
            fits = size > MIN_FILL * columns
            rectangles += [(rows + 1, columns)] if fits else [(rows, columns), (1, size)]
        width = torch.tensor([columns for rows, columns in rectangles for _ in range(rows)], dtype=torch.int64)
        first_cell = torch.zeros_like(num_sets)
        first_cell[order[: len(width)]] = width.cumsum(0) - width
        return cls(len(num_sets), tuple(rectangles), patient, position, first_cell[patient] + position)


class TimeEncoding(nn.Module):
    """Encode minutes as [S, D]: a projection of asinh of the hours and of sinusoids of the hours.

    Periods run from half an hour to twenty years in equal ratios.  The encoding is continuous, of bounded scale, and
    defined for negative and for very late times.
    """

    turns_per_minute: Tensor

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        hours = torch.logspace(
            math.log10(_SHORTEST_HOURS), math.log10(_LONGEST_HOURS), frequencies, dtype=torch.float64
        )
        self.register_buffer("turns_per_minute", 1 / (60 * hours), persistent=False)
        self.project = nn.Linear(2 * frequencies + 1, width)

    def forward(self, minute_S: Tensor) -> Tensor:
        return self.project(torch.cat([*self.sinusoids(minute_S), (minute_S[:, None] / 60).asinh()], dim=1))

    def sinusoids(self, minute_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return sines and cosines [S, frequencies] float32.

        Whole turns are taken off in float64: after twenty years the fastest sinusoid has made 350,000 of them, and in
        float32 its angle would be off by a tenth of a radian and more.
        """
        turns = minute_S.double()[:, None] * self.turns_per_minute
        angle = ((turns - turns.round()) * (2 * math.pi)).float()
        return angle.sin(), angle.cos()


class CausalLayer(nn.Module):
    """A pre-norm layer: causal self-attention, then a GELU feed-forward; dropout on the output of both."""

    def __init__(self, config: SeqSetVAEConfig, index: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.index = config.heads, config.dropout, index
        self.norm_attention = nn.LayerNorm(config.width)
        # No bias: a key's bias has no effect, and Adam would follow the rounding noise of its gradient.
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
        sizes = [rows * columns for rows, columns in layout.rectangles]
        cells_3D = qkv_S3D.new_zeros(sum(sizes), qkv_S3D.shape[1]).index_copy(0, layout.cell, qkv_S3D)
        attended = [qkv_S3D[:0].chunk(3, dim=1)[0]]
        for (rows, columns), cells in zip(layout.rectangles, cells_3D.split(sizes), strict=True):
            query, key, value = cells.view(rows, columns, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended_BHKD = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            attended.append(attended_BHKD.transpose(1, 2).reshape(rows * columns, -1))
        return torch.cat(attended)[layout.cell]

    def _drop(self, x: Tensor, noise: Noise | None, salt: int) -> Tensor:
        return x if noise is None else noise.dropout(x, DROPOUT_SALT + salt, self.dropout)


class CausalTransformer(nn.Module):
    """Encode latents and minutes of sets as contexts: set k sees sets ≤ k of its own patient and nothing else."""

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.time = TimeEncoding(config.width)
        self.norm_input = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(CausalLayer(config, index) for index in range(config.layers))
        self.norm_output = nn.LayerNorm(config.width)

    def forward(
        self, z_SD: Tensor, minute_S: Tensor, layout: SequenceLayout, noise: Noise | None, *, checkpointed: bool = False
    ) -> Tensor:
        """Return the contexts [S, D] of latents [S, D] and minutes [S], all in the batch's order of sets."""
        x_SD = self.norm_input(z_SD + sinusoids(layout.position, z_SD.shape[1]) + self.time(minute_S))
        for layer in self.layers:
            x_SD = run_block(layer, x_SD, layout, noise, checkpointed=checkpointed)
        return self.norm_output(x_SD)
