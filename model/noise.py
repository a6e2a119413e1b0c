"""Random numbers that depend on who they are for, not on when they are drawn.

The posterior's sample and dropout of a set are a hash of (seed, step, patient, set, channel): a counter-based generator
(Salmon et al. 2011; the hash is the finaliser of SplitMix64, Steele et al. 2014).  So a patient gets the same noise
alone, in any batch, on any number of devices, after a resume, and in the second forward pass of gradient
checkpointing, and no generator's state has to be saved.

Shape suffixes: S sets, D channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(number: int) -> int:
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64; torch's products wrap, its right shift copies the sign."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def patient_keys(patient_id: Sequence[str]) -> Tensor:
    """[B] int64, a hash of each patient's id."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in patient_id]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class PatientNoise:
    """The noise of one training step, for the patients of a batch.

    Attributes:
        key: [B] int64, one a patient.
    """

    key: Tensor

    @classmethod
    def of_step(cls, seed: int, step: int, patient_key: Tensor) -> PatientNoise:
        """Args: ``patient_key``: [B] int64, from :func:`patient_keys`."""
        return cls(_mix(patient_key ^ _signed(seed * _GOLDEN + (step + 1) * 0xD1342543DE82EF95)))

    def at(self, patient: Tensor, place: Tensor) -> Noise:
        """Noise for rows [S] of patients: the position in the batch of each row's patient, its place within it."""
        return Noise(_mix(self.key[patient] + place * _signed(_GOLDEN)))

    def of_patients(self) -> Noise:
        """Noise for the patients themselves, a row each."""
        return Noise(_mix(self.key - _signed(_GOLDEN)))


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise for rows of a flat array.

    Attributes:
        key: [S] int64, one a row.
    """

    key: Tensor

    def _bits(self, salt: int, width: int) -> Tensor:
        """[S, width] int64, 64 random bits each."""
        channel = (torch.arange(width, device=self.key.device) + 1) * _signed(_GOLDEN)
        return _mix(_mix(self.key + _signed((salt + 1) * 0xA0761D6478BD642F))[:, None] + channel)

    def uniform(self, salt: int) -> Tensor:
        """[S] float32 from [0, 1); ``salt`` tells uses apart."""
        return (self._bits(salt, 1)[:, 0] & 0xFFFFFF).float() / (1 << 24)

    def normal(self, salt: int, width: int) -> Tensor:
        """[S, width] float32, standard normal (Box and Muller 1958); ``width`` is even."""
        bits = self._bits(salt, width // 2)
        unit = 1.0 / (1 << 24)
        first = ((bits & 0xFFFFFF).float() + 0.5) * unit
        second = (((bits >> 32) & 0xFFFFFF).float()) * (2 * math.pi * unit)
        radius = (-2 * first.log()).sqrt()
        return torch.cat([radius * second.cos(), radius * second.sin()], dim=1)

    def dropout(self, x: Tensor, salt: int, probability: float) -> Tensor:
        """Inverted dropout of x [S, D]; a share of 1/65,536 is the finest."""
        if probability == 0.0:
            return x
        width = x.shape[1]
        draws = self._bits(salt, -(-width // 4)).view(torch.int16)[:, :width]  # four of a hash, -32768 … 32767
        keep = draws >= round(probability * (1 << 16)) - (1 << 15)
        return x * keep.to(x.dtype) / (1 - probability)
