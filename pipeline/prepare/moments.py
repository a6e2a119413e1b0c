"""Moments of each variable, computed in parts and merged exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.prepare.column_file import open_columns, write_columns

EMPTY: Final = {
    "count": 0,
    "everywhere": 0,
    "num_values": 0,
    "mean": 0.0,
    "squares": 0.0,
    "minimum": np.inf,
    "maximum": -np.inf,
}
"""What is said of a variable without events, by the names of the arrays."""

VARIABLES: Final = "variables"


@dataclass(frozen=True, slots=True)
class Moments:
    """Number of events, number of values, mean and summed squared deviations of V variables, [V] each.

    All but ``everywhere`` are of the train split.
    """

    variables: list[str]
    count: npt.NDArray[np.int64]
    everywhere: npt.NDArray[np.int64]  # events of all splits
    num_values: npt.NDArray[np.int64]  # events with a number
    mean: npt.NDArray[np.float64]  # 0 where there is no number
    squares: npt.NDArray[np.float64]  # sum of squared deviations from the mean
    minimum: npt.NDArray[np.float64]  # infinite where there is no number
    maximum: npt.NDArray[np.float64]  # minus infinite where there is no number

    @classmethod
    def measure(
        cls,
        variables: list[str],
        variable: npt.NDArray[Any],
        value: npt.NDArray[np.float32],
        in_train: npt.NDArray[np.bool_] | None = None,
    ) -> Self:
        """Measure events: ``variable`` [E] positions in ``variables``, ``value`` [E] with NaN for no number.

        All are of the train split unless ``in_train`` [E] says which.  Sums of fewer than 2^29 equal float32 numbers
        are exact in float64: a constant has a variance of exactly 0.
        """
        size = len(variables)
        everywhere = np.bincount(variable, minlength=size)
        if in_train is not None:
            variable, value = variable[in_train], value[in_train]
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
        return cls(variables, count, everywhere, num_values, mean, squares, mean + minimum, mean + maximum)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Return the moments of all parts, merged pairwise in their order (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        position: dict[str, int] = {}
        total = {name: np.full(0, nothing) for name, nothing in EMPTY.items()}
        for part in parts:
            new = [variable for variable in part.variables if variable not in position]
            position.update(zip(new, range(len(position), len(position) + len(new)), strict=True))
            if new:
                total = {name: np.concatenate([total[name], np.full(len(new), EMPTY[name])]) for name in EMPTY}
            _add(total, part, np.fromiter(map(position.__getitem__, part.variables), np.intp, len(part.variables)))
        variables = sorted(position)
        order = np.fromiter(map(position.__getitem__, variables), np.intp, len(variables))
        return cls(variables, **{name: column[order] for name, column in total.items()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return moments that :meth:`save` wrote."""
        with open_columns(path) as file:
            arrays = {name: file.read(name) for name in EMPTY}
            return cls(file.read_texts(VARIABLES).to_pylist(), **arrays)

    def save(self, path: Path) -> None:
        """Write the moments to a file, whole or not at all."""
        arrays = {name: getattr(self, name) for name in EMPTY}
        write_columns(path, arrays, {VARIABLES: pa.array(self.variables, pa.string())})

    @property
    def num_events(self) -> int:
        """Return the number of events of the train split."""
        return int(self.count.sum())

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Return [V] the population standard deviation."""
        return np.sqrt(self.squares / np.maximum(self.num_values, 1))


def _add(total: dict[str, npt.NDArray[Any]], part: Moments, at: npt.NDArray[np.intp]) -> None:
    """Add a part, whose variables stand ``at`` these positions, to the moments so far."""
    before = total["num_values"][at]
    weight = part.num_values / np.maximum(before + part.num_values, 1)
    delta = np.where(part.num_values > 0, part.mean - total["mean"][at], 0.0)
    total["squares"][at] += part.squares + delta**2 * before * weight
    total["mean"][at] += delta * weight
    for name in ("num_values", "count", "everywhere"):
        total[name][at] += getattr(part, name)
    total["minimum"][at] = np.minimum(total["minimum"][at], part.minimum)
    total["maximum"][at] = np.maximum(total["maximum"][at], part.maximum)
