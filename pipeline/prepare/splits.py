"""Assign patients to splits by a hash of their id."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.options import Section, option
from pipeline.schema import SPLITS, UserError

SplitName: TypeAlias = Literal["train", "valid", "test"]

HASH_BITS: Final = 63
MAX_SEED: Final = 2**63 - 1
FRACTIONS: Final = (0.64, 0.16, 0.20)


def parse_fractions(text: str) -> tuple[float, ...]:
    """Return the numbers of ``F,F,F``; raise ValueError where they are none or leave no patient for train."""
    fractions = tuple(map(float, text.split(",")))
    if fractions[0] == 0:
        raise ValueError(f"{text!r} leaves no patient for train")
    return fractions


@dataclass(frozen=True, kw_only=True)
class SplitRule(Section):
    """Splits of patients for whom the input has none.

    A patient's split follows from its id alone: other patients, added or left out, move nobody.
    """

    split_fractions: tuple[float, ...] = option(FRACTIONS, "Fractions of train,valid,test.", parse=parse_fractions)
    split_seed: int = option(0, "Random seed of the split.", minimum=-MAX_SEED - 1, maximum=MAX_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        fractions = self.split_fractions
        if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0):
            raise UserError(f"--split_fractions {','.join(map(str, fractions))}: not three fractions that sum to 1")

    @classmethod
    def all_in(cls, split: str) -> SplitRule:
        """Return the rule by which every patient goes to ``split``."""
        return cls(split_fractions=tuple(float(name == split) for name in SPLITS))

    def hash_patients(self, patient_ids: Sequence[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return two independent hashes of each patient, of ``HASH_BITS`` bits: one to partition, one to split by."""
        key = self.split_seed.to_bytes(8, "little", signed=True)
        digests = [hashlib.blake2b(name.encode(), digest_size=16, key=key).digest() for name in patient_ids]
        pairs = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2) >> np.uint64(64 - HASH_BITS)
        return pairs[:, 0], pairs[:, 1]

    def split_by(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int8]:
        """Return [P] the position of each patient's split in ``SPLITS``, by the second of its hashes."""
        fraction = hashes / 2.0**HASH_BITS
        return np.searchsorted(np.cumsum(self.split_fractions[:-1]), fraction, side="right").astype(np.int8)
