"""Splits, per-variable moments of the train split, and the vocabulary made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.clean import RESERVED_VARIABLES
from pipeline.schema import FIRST_CODE
from pipeline.shards import VOCABULARY_SCHEMA

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Of V variables: how many events, how many with a number, and the numbers' mean and summed squared deviations.

    Attributes:
        variables: V names.
        count: [V] int64, events.
        num_values: [V] int64, events with a number.
        mean: [V] float64; 0 where there is no number.
        squares: [V] float64, the sum of squared deviations from the mean.
    """

    variables: list[str]
    count: npt.NDArray[np.int64]
    num_values: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]

    @classmethod
    def of(cls, variables: list[str], variable: npt.NDArray[np.integer[Any]], value: npt.NDArray[np.float32]) -> Self:
        """Of events: ``variable`` [E] positions in ``variables``, ``value`` [E] with NaN for no number.

        Sums of fewer than 2^29 equal float32 numbers are exact in float64: a constant has a variance of exactly 0.
        """
        size = len(variables)
        number = ~np.isnan(value)
        position, wide = variable[number], value[number].astype(np.float64)
        num_values = np.bincount(position, minlength=size)
        mean = np.bincount(position, wide, minlength=size) / np.maximum(num_values, 1)
        wide -= mean[position]
        return cls(
            variables=variables,
            count=np.bincount(variable, minlength=size),
            num_values=num_values,
            mean=mean,
            squares=np.bincount(position, wide**2, minlength=size).astype(np.float64),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(
            variables=content["variables"],
            count=np.array(content["count"], np.int64),
            num_values=np.array(content["num_values"], np.int64),
            mean=np.array(content["mean"], np.float64),
            squares=np.array(content["squares"], np.float64),
        )

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Of all parts together, merged pairwise in their order (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        variables = sorted({variable for part in parts for variable in part.variables})
        place = {variable: number for number, variable in enumerate(variables)}
        count, num_values = np.zeros((2, len(variables)), dtype=np.int64)
        mean, squares = np.zeros((2, len(variables)))
        for part in parts:
            at = np.array([place[variable] for variable in part.variables], dtype=np.intp)
            before, total = num_values[at], num_values[at] + part.num_values
            share = part.num_values / np.maximum(total, 1)
            delta = np.where(part.num_values > 0, part.mean - mean[at], 0.0)
            squares[at] += part.squares + delta**2 * before * share
            mean[at] += delta * share
            num_values[at] = total
            count[at] += part.count
        return cls(variables=variables, count=count, num_values=num_values, mean=mean, squares=squares)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """[V] population standard deviation."""
        return np.sqrt(self.squares / np.maximum(self.num_values, 1))


def make_vocabulary(
    train: Moments,
    given: Mapping[str, tuple[float, float]],
    *,
    min_count: int = 1,
    limits: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    descriptions: Mapping[str, str] = MappingProxyType({}),
) -> pa.Table:
    """The vocabulary: padding, unknown, then the train split's variables in the order of their names.

    Args:
        train: moments of the train split.
        given: mean and std to use instead, by variable.
        min_count: variables with fewer events are left out, unless they have limits.
        limits: low and high, by variable; that they leave fewer events makes no variable unknown.
        descriptions: what variables mean, where it is known.

    Returns:
        ``VOCABULARY_SCHEMA``; ``mean`` and ``std`` are those that values are scaled with: std 1 where it is 0.
    """
    limited = np.array([variable in limits for variable in train.variables], dtype=np.bool_)
    seen = np.flatnonzero((train.count >= max(min_count, 1)) | limited)
    variables = [train.variables[number] for number in seen]
    mean, std = train.mean[seen], train.std[seen]
    for number, variable in enumerate(variables):
        if variable in given:
            mean[number], std[number] = given[variable]
    std[std == 0] = 1.0
    reserved = len(RESERVED_VARIABLES)
    assert reserved == FIRST_CODE
    return pa.table(
        {
            "code": np.arange(reserved + len(variables), dtype=np.int32),
            "variable": [*RESERVED_VARIABLES, *variables],
            "count": np.concatenate([np.zeros(reserved, np.int64), train.count[seen]]),
            "mean": np.concatenate([np.zeros(reserved), mean]),
            "std": np.concatenate([np.ones(reserved), std]),
            "low": [None] * reserved + [limits.get(variable, (None, None))[0] for variable in variables],
            "high": [None] * reserved + [limits.get(variable, (None, None))[1] for variable in variables],
            "description": [None] * reserved + [descriptions.get(variable) for variable in variables],
        },
        schema=VOCABULARY_SCHEMA,
    )


def vocabulary_fingerprint(vocabulary: pa.Table) -> str:
    """sha256 over names, means and stds, in the order of their codes."""
    digest = hashlib.sha256()
    for variable in vocabulary["variable"].to_pylist():
        encoded = variable.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    for name in ("mean", "std"):
        digest.update(vocabulary[name].to_numpy().astype("<f8").tobytes())
    return digest.hexdigest()
