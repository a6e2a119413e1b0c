"""Arrow lists of flat arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import offsets_from_sizes


def to_lists(
    sizes: npt.NDArray[Any], values: npt.NDArray[Any], is_null: npt.NDArray[np.bool_] | None = None
) -> pa.ListArray:
    """Return lists of the given sizes, one after the other in ``values``; NaN becomes null, as do lists that are."""
    flat = pa.array(np.ascontiguousarray(values), from_pandas=True)
    mask = None if is_null is None else pa.array(is_null)
    return pa.ListArray.from_arrays(pa.array(offsets_from_sizes(sizes).astype(np.int32)), flat, mask=mask)
