"""Arrow lists of flat arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import offsets_from_sizes


def to_lists(sizes: npt.NDArray[Any], values: npt.NDArray[Any]) -> pa.ListArray:
    """Return lists of the given sizes, one after the other in ``values``; NaN becomes null."""
    flat = pa.array(np.ascontiguousarray(values), from_pandas=True)
    return pa.ListArray.from_arrays(offsets_from_sizes(sizes).astype(np.int32), flat)
