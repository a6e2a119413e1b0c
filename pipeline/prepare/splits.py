"""Which split a patient belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HASH_BITS = 63


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
    """Where a patient goes, from its id alone: other patients, added or left out, move nobody.

    Attributes:
        fractions: of patients in train, valid and test; they sum to 1.
    """

    fractions: tuple[float, float, float] = (0.64, 0.16, 0.20)
    seed: int = 0

    def hashes(self, patient_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Two independent hashes of each patient, of ``HASH_BITS`` bits: one to partition by, one to split by."""
        key = self.seed.to_bytes(8, "little", signed=True)
        digests = b"".join(
            hashlib.blake2b(patient_id.encode(), digest_size=16, key=key).digest() for patient_id in patient_ids
        )
        pairs = np.frombuffer(digests, dtype="<u8").reshape(-1, 2) >> np.uint64(64 - HASH_BITS)
        return pairs[:, 0], pairs[:, 1]

    def split(self, patient_ids: Sequence[str]) -> npt.NDArray[np.int8]:
        """[P] position in ``SPLITS``."""
        share = self.hashes(patient_ids)[1] / 2.0**HASH_BITS
        return np.searchsorted(np.cumsum(self.fractions[:-1]), share, side="right").astype(np.int8)
