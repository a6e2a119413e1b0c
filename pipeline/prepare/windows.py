"""The lengths of windows: how many events and sets a patient has up to a time."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.arrays import Floats, Ints, offsets_from_sizes
from pipeline.dataset.schemas import SHARD_SCHEMA

WINDOW_SCHEMA: Final = pa.schema(
    [SHARD_SCHEMA.field(name) for name in ("num_events", "num_sets", "minute", "set_size", "event_minute")]
)
"""The columns of a shard that say when its events were."""


def count_until(rows: pa.Table, position: Ints, minute: Floats, excluded: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the numbers of events and of sets, each [N], of samples up to their prediction minutes, inclusive, and
    whether their last sets are whole (1), or have later events (0).

    Static events are before all minutes.  Where sets overlap in time (by a ``set_index``), a window ends before the
    first event that is later.

    Args:
        rows: columns ``WINDOW_SCHEMA`` of a shard, and ``code`` where codes are excluded.
        position: [N] row of the shard of each sample's patient.
        minute: [N] minute from the patient's time origin; infinite = the whole patient.
        excluded: codes whose events do not count, nor sets that have no others.
    """
    set_offsets = offsets_from_sizes(_flatten(rows, "set_size"))
    first_set = offsets_from_sizes(rows["num_sets"].to_numpy())
    set_minute = np.nan_to_num(_flatten(rows, "minute").astype(np.float64), nan=-np.inf)
    num_sets = _count_in_parts(set_minute, first_set, position, minute)
    first = set_offsets[first_set[position]]
    num_events = set_offsets[first_set[position] + num_sets] - first
    has_minutes = rows["event_minute"].is_valid().to_numpy()
    exact = np.flatnonzero(has_minutes[position])
    if len(exact):
        event_offsets = offsets_from_sizes(np.where(has_minutes, rows["num_events"].to_numpy(), 0))
        event_minute = np.nan_to_num(_flatten(rows, "event_minute").astype(np.float64), nan=-np.inf)
        latest = _running_maximum(event_minute, event_offsets)
        num_events[exact] = _count_in_parts(latest, event_offsets, position[exact], minute[exact])
        stop = np.searchsorted(set_offsets, first[exact] + num_events[exact], side="left")
        num_sets[exact] = stop - first_set[position[exact]]
    stop = first_set[position] + num_sets
    if not len(excluded):
        return num_events, num_sets, (first + num_events == set_offsets[stop]).astype(np.int64)
    kept_before = offsets_from_sizes(~np.isin(_flatten(rows, "code"), excluded))
    sets_before = offsets_from_sizes(np.diff(kept_before[set_offsets]) > 0)
    last = np.maximum(stop - 1, 0)  # of a window's sets, which may be cut
    num_kept = kept_before[first + num_events] - kept_before[first]
    in_last = kept_before[first + num_events] > kept_before[set_offsets[last]]
    num_kept_sets = sets_before[last] - sets_before[first_set[position]] + in_last
    is_whole = ~in_last | (kept_before[first + num_events] == kept_before[set_offsets[stop]])
    return num_kept, np.where(num_sets > 0, num_kept_sets, 0), is_whole.astype(np.int64)


def _flatten(rows: pa.Table, name: str) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat


def _running_maximum(values: Floats, offsets: Ints) -> Floats:
    """Return the maximum of each value and those before it in its part ``offsets[p]:offsets[p+1]``."""
    ends = np.zeros(len(values), np.bool_)
    ends[offsets[1:-1][np.diff(offsets[1:]) > 0]] = True  # where a part begins, but for the first
    if not ((values[1:] < values[:-1]) & ~ends[1:]).any():
        return values
    unique, rank = np.unique(values, return_inverse=True)
    part = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    running = np.maximum.accumulate(part * len(unique) + rank) - part * len(unique)
    maximum: Floats = unique[running]
    return maximum


def _count_in_parts(values: Floats, offsets: Ints, part: Ints, limit: Floats) -> Ints:
    """Return [N] how many values of a part, which ascend, are at most ``limit`` [N]; ``part`` [N] says which part."""
    low, high = offsets[part], offsets[part + 1]
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_below = is_open & (values[np.minimum(middle, len(values) - 1)] <= limit)
        low = np.where(is_below, middle + 1, low)
        high = np.where(is_open & ~is_below, middle, high)
    return low - offsets[part]
