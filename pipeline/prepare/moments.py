"""Moments of each variable, computed in parts and merged exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Moments:
    """Number of events, number of values, mean and summed squared deviations of V variables, [V] each."""

    variables: list[str]
    count: npt.NDArray[np.int64]
    num_values: npt.NDArray[np.int64]  # events with a number
    mean: npt.NDArray[np.float64]  # 0 where there is no number
    squares: npt.NDArray[np.float64]  # sum of squared deviations from the mean
    minimum: npt.NDArray[np.float64]  # infinite where there is no number
    maximum: npt.NDArray[np.float64]  # minus infinite where there is no number

    @classmethod
    def measure(cls, variables: list[str], variable: npt.NDArray[Any], value: npt.NDArray[np.float32]) -> Self:
        """Measure events: ``variable`` [E] positions in ``variables``, ``value`` [E] with NaN for no number.

        Sums of fewer than 2^29 equal float32 numbers are exact in float64: a constant has a variance of exactly 0.
        """
        size = len(variables)
        is_number = ~np.isnan(value)
        position, wide = variable[is_number], value[is_number].astype(np.float64)
        num_values = np.bincount(position, minlength=size)
        mean = np.bincount(position, wide, minlength=size) / np.maximum(num_values, 1)
        wide -= mean[position]
        squares = np.bincount(position, wide**2, minlength=size).astype(np.float64)
        minimum, maximum = np.full(size, np.inf), np.full(size, -np.inf)
        np.minimum.at(minimum, position, wide)
        np.maximum.at(maximum, position, wide)
        count = np.bincount(variable, minlength=size)
        return cls(variables, count, num_values, mean, squares, mean + minimum, mean + maximum)

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """Return the moments of all parts, merged pairwise in their order (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        variables = sorted({variable for part in parts for variable in part.variables})
        position = {variable: number for number, variable in enumerate(variables)}
        count, num_values = np.zeros((2, len(variables)), dtype=np.int64)
        mean, squares = np.zeros((2, len(variables)))
        minimum, maximum = np.full(len(variables), np.inf), np.full(len(variables), -np.inf)
        for part in parts:
            at = np.array([position[variable] for variable in part.variables], dtype=np.intp)
            before, total = num_values[at], num_values[at] + part.num_values
            weight = part.num_values / np.maximum(total, 1)
            delta = np.where(part.num_values > 0, part.mean - mean[at], 0.0)
            squares[at] += part.squares + delta**2 * before * weight
            mean[at] += delta * weight
            num_values[at] = total
            count[at] += part.count
            minimum[at] = np.minimum(minimum[at], part.minimum)
            maximum[at] = np.maximum(maximum[at], part.maximum)
        return cls(variables, count, num_values, mean, squares, minimum, maximum)

    @property
    def num_events(self) -> int:
        return int(self.count.sum())

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Return [V] the population standard deviation."""
        return np.sqrt(self.squares / np.maximum(self.num_values, 1))
