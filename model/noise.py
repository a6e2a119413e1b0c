"""Random numbers that depend on whom they are for, not on when they are drawn.

The sample of the posterior and the dropout of a set are a hash of (seed, step, patient, set, channel): a counter-based
generator (Salmon et al. 2011; the hash is the finaliser of SplitMix64, Steele et al. 2014).  So a patient gets the same
noise alone, in any batch, on any number of devices, after a resume, and in the second forward pass of gradient
checkpointing, and no state of a generator has to be saved.

Shape suffixes: B patients, S sets, V pairs of patient and variable, D channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import ops
from model.kernels.ops import uses_kernels

_GOLDEN = 0x9E3779B97F4A7C15
_SALT = 0xA0761D6478BD642F
_MASK = (1 << 64) - 1


def _signed(number: int) -> int:
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number


def _offset(salt: int) -> int:
    """Return what a use of noise adds to the keys of rows, so that each has noise of its own."""
    return _signed((salt + 1) * _SALT)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 to each int64; torch's products wrap, its right shift copies the sign."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True, slots=True)
class PatientNoise:
    """The keys of the patients of a batch at one training step, from which all of their noise follows.

    Attributes:
        key: [B] int64.
    """

    key: Tensor

    @classmethod
    def for_step(cls, sample_key: Sequence[str], *, seed: int, step: int) -> PatientNoise:
        """Return the noise of samples; ``sample_key`` tells those of one patient apart."""
        digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in sample_key]
        key = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
        return cls(_mix(key ^ _signed(seed * _GOLDEN + (step + 1) * 0xD1342543DE82EF95)))

    def for_rows(self, patient: Tensor, position: Tensor) -> Noise:
        """Return noise for rows [S] that belong to patients.

        Args:
            patient: [S] int64, the patient of each row, as its position in the batch.
            position: [S] int64, which tells the rows of a patient apart.
        """
        return Noise(_mix(self.key[patient] + position * _signed(_GOLDEN)))

    def for_patients(self) -> Noise:
        """Return noise for the patients themselves, one row each."""
        return Noise(_mix(self.key - _signed(_GOLDEN)))


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise for the rows of a flat array.

    Attributes:
        key: [S] int64, one for each row.
        rows: [N] int64, the key of each row, where several have the same noise; None = each has its own.
    """

    key: Tensor
    rows: Tensor | None = None

    def _bits(self, salt: int, width: int) -> Tensor:
        """Return [S, width] int64, 64 random bits for each key."""
        channel = (torch.arange(width, device=self.key.device) + 1) * _signed(_GOLDEN)
        return _mix(_mix(self.key + _offset(salt))[:, None] + channel)

    def _spread(self, drawn: Tensor) -> Tensor:
        """Return [N, …], for each row what was drawn for its key."""
        return drawn if self.rows is None else drawn.index_select(0, self.rows)

    def _row_keys(self) -> Tensor:
        """Return [N] int64, the key of each row, as kernels take them."""
        return self.key if self.rows is None else self.key.index_select(0, self.rows)

    def uniform(self, salt: int) -> Tensor:
        """Return [S] float32 from [0, 1); each use has a ``salt`` of its own."""
        return self._spread((self._bits(salt, 1)[:, 0] & 0xFFFFFF).float() / (1 << 24))

    def normal(self, salt: int, width: int) -> Tensor:
        """Return [S, width] float32, standard normal (Box and Muller 1958); ``width`` is even."""
        if uses_kernels(self.key.device):
            return ops.normal(self._row_keys(), _offset(salt), width)
        bits = self._bits(salt, width // 2)
        unit = 1.0 / (1 << 24)
        first = ((bits & 0xFFFFFF).float() + 0.5) * unit
        second = (((bits >> 32) & 0xFFFFFF).float()) * (2 * math.pi * unit)
        radius = (-2 * first.log()).sqrt()
        return self._spread(torch.cat([radius * second.cos(), radius * second.sin()], dim=1))

    def dropout(self, x: Tensor, salt: int, probability: float) -> Tensor:
        """Apply inverted dropout to x [S, D]; probabilities are rounded to 1/65,536."""
        if probability == 0.0:
            return x
        if uses_kernels(x.device):
            return ops.dropout(x, self._row_keys(), _offset(salt), probability)
        width = x.shape[1]
        draws = self._bits(salt, -(-width // 4)).view(torch.int16)[:, :width]  # four of a hash, -32768 … 32767
        keep = draws >= round(probability * (1 << 16)) - (1 << 15)
        return x * self._spread(keep.to(x.dtype)) / (1 - probability)


@dataclass(frozen=True, slots=True)
class StepNoise:
    """The noise of one training step for all that the model draws it for.

    Attributes:
        patient: noise of the patients [B].
        set: noise of the sets [S].
        pair: noise of the pairs of patient and variable [V].
    """

    patient: Noise
    set: Noise
    pair: Noise
