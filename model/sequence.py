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
from model.kernels import ops
from model.kernels.ops import SEQUENCE_TILE, uses_kernels
from model.noise import Noise
from model.segments import Segments, take_unique
from model.set_vae import run_block, sinusoids

MIN_FILL = 0.75
"""A patient joins a rectangle if its sets fill more than this fraction of a row."""

DROPOUT_SALT = 16
"""First salt of dropout; smaller ones belong to the sample of the posterior and to the outcome head."""

_SHORTEST_HOURS, _LONGEST_HOURS, _NUM_PERIODS = 0.5, 24 * 365.25 * 20, 16

TIME_FEATURES = 2 * _NUM_PERIODS + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """The positions of a batch's sets in their patients and in the rectangles.

    Attributes:
        rectangles: (rows, columns) of each rectangle, the one with most columns first; a row is a patient.
        patient: [S] int64, the patient of each set.
        position: [S] int64, 0, 1, 2 … within the patient.
        cell: [S] int64, the cell of each set among those of all rectangles, row by row.
        offsets: [B+1] int64, the first set of each patient.
        tile_patient, tile_begin: [T] int64, the patient and the first position of tiles of sets of one patient.
    """

    rectangles: tuple[tuple[int, int], ...]
    patient: Tensor
    position: Tensor
    cell: Tensor
    offsets: Tensor
    tile_patient: Tensor
    tile_begin: Tensor

    @property
    def sets_of_patient(self) -> Segments:
        return Segments(self.patient, self.offsets)

    @classmethod
    def build(cls, patient_offsets: Tensor, tiles: int = 0) -> SequenceLayout:
        """Lay out patients from [B+1] int64 on the CPU: numbers of sets decide shapes; so may a number of ``tiles``."""
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
        is_first = position % SEQUENCE_TILE == 0
        tile_patient, tile_begin = patient[is_first], position[is_first]
        if more := max(tiles - len(tile_patient), 0):  # they lie behind the end of the shortest patient
            shortest = num_sets.argmin()
            end = SEQUENCE_TILE * -(-num_sets[shortest] // SEQUENCE_TILE)
            tile_patient = torch.cat([tile_patient, shortest.expand(more)])
            tile_begin = torch.cat([tile_begin, end.expand(more)])
        return cls(
            rectangles=tuple(rectangles),
            patient=patient,
            position=position,
            cell=first_cell[patient] + position,
            offsets=patient_offsets,
            tile_patient=tile_patient,
            tile_begin=tile_begin,
        )


def time_features(minute_S: Tensor) -> Tensor:
    """Return [S, TIME_FEATURES] float32: sines and cosines of the hours, and their asinh.

    Periods run from half an hour to twenty years in equal ratios.  The features are continuous, of bounded scale, and
    defined for negative and for very late times.  Whole turns are taken off in float64: after twenty years the fastest
    sinusoid has made 350,000 of them, and in float32 its angle would be off by a tenth of a radian and more.
    """
    shortest, longest = map(math.log10, (_SHORTEST_HOURS, _LONGEST_HOURS))
    hours = torch.logspace(shortest, longest, _NUM_PERIODS, dtype=torch.float64)
    turns = minute_S.double()[:, None] * (1 / (60 * hours))
    angle = ((turns - turns.round()) * (2 * math.pi)).float()
    return torch.cat([angle.sin(), angle.cos(), (minute_S[:, None] / 60).asinh()], dim=1)


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
        if uses_kernels(qkv_S3D.device):
            qkv_S3HK = qkv_S3D.unflatten(1, (3, self.heads, -1))
            return ops.causal(qkv_S3HK, layout.tile_patient, layout.tile_begin, layout.offsets)[0].flatten(1)
        sizes = [rows * columns for rows, columns in layout.rectangles]
        cells_3D = qkv_S3D.new_zeros(sum(sizes), qkv_S3D.shape[1]).index_copy(0, layout.cell, qkv_S3D)
        attended = [qkv_S3D[:0].chunk(3, dim=1)[0]]
        for (rows, columns), cells in zip(layout.rectangles, cells_3D.split(sizes), strict=True):
            query, key, value = cells.view(rows, columns, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended_BHKD = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            attended.append(attended_BHKD.transpose(1, 2).reshape(rows * columns, -1))
        return take_unique(torch.cat(attended), layout.cell)

    def _drop(self, x: Tensor, noise: Noise | None, salt: int) -> Tensor:
        return x if noise is None else noise.dropout(x, DROPOUT_SALT + salt, self.dropout)


class CausalTransformer(nn.Module):
    """Encode latents and minutes of sets as contexts: set k sees sets ≤ k of its own patient and nothing else."""

    def __init__(self, config: SeqSetVAEConfig) -> None:
        super().__init__()
        self.time = nn.Linear(TIME_FEATURES, config.width)
        self.norm_input = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(CausalLayer(config, index) for index in range(config.layers))
        self.norm_output = nn.LayerNorm(config.width)

    def forward(
        self, z_SD: Tensor, time_ST: Tensor, layout: SequenceLayout, noise: Noise | None, *, checkpointed: bool = False
    ) -> Tensor:
        """Return the contexts [S, D] of latents [S, D] and time features, all in the batch's order of sets."""
        x_SD = self.norm_input(z_SD + sinusoids(layout.position, z_SD.shape[1]) + self.time(time_ST))
        for layer in self.layers:
            x_SD = run_block(layer, x_SD, layout, noise, checkpointed=checkpointed)
        return self.norm_output(x_SD)
