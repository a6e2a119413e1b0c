"""Index arithmetic of flat arrays: sizes, offsets and ranges, without a loop over what they count."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT_NUMBERS = 1 << 17
"""1 MB."""


def offsets_of(sizes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[N+1] int64 offsets of parts of the given sizes [N]: part ``i`` is ``offsets[i]:offsets[i+1]``."""
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def ranges(starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The ranges ``starts[i] : starts[i] + sizes[i]`` one after another, [sum of sizes] int64."""
    stops = np.cumsum(sizes)
    positions = np.repeat(starts - (stops - sizes), sizes)
    positions += _numbers()[: len(positions)] if len(positions) <= KEPT_NUMBERS else np.arange(len(positions))
    return positions


@cache
def _numbers() -> npt.NDArray[np.int64]:
    """0, 1, 2 …, to read: to count anew would be a third of the work of a short :func:`ranges`."""
    return np.arange(KEPT_NUMBERS)
