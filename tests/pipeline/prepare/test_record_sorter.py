from __future__ import annotations

import errno
from itertools import chain
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import record_sorter
from pipeline.prepare.record_sorter import RecordSorter, RunWriter, SortedRecords, SpillFile, cut_keys
from pipeline.schema import UserError

DTYPE = np.dtype([("key", np.uint64), ("other", np.float64)])
HIGH = (1 << 64) - 1


def sort(parts: list[list[tuple[int, float]]]) -> SortedRecords:
    sorter = RecordSorter(DTYPE, "other")
    for part in parts:
        sorter.add(np.array(part, DTYPE))
    return sorter.finish()


PARTS = st.lists(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 1 << 63, HIGH]), st.integers(-9, 9).map(float)), max_size=12),
    max_size=8,
)


@given(
    parts=PARTS,
    others=PARTS,
    run_rows=st.integers(1, 9),
    stride=st.integers(1, 9),
    bounds=st.tuples(*[st.none() | st.integers(0, HIGH)] * 2),
)
def test_ranges_together_are_all_records_in_order(
    parts: list[list[tuple[int, float]]],
    others: list[list[tuple[int, float]]],
    run_rows: int,
    stride: int,
    bounds: tuple[int | None, int | None],
) -> None:
    with patch.object(record_sorter, "RUN_ROWS", run_rows), patch.object(record_sorter, "STRIDE", stride):
        both = sort(parts), sort(others)
        ranges = list(cut_keys(*both))
        found = [[records.read(keys).tolist() for keys in ranges] for records in both]
        low, high = bounds
        by_hand = [row for row in sorted(chain(*parts)) if (low or 0) <= row[0] and (high is None or row[0] < high)]
        assert both[0].read(bounds).tolist() == by_hand
    for read, given_parts in zip(found, (parts, others), strict=True):
        assert list(chain(*read)) == sorted(chain(*given_parts))
    assert both[0].is_in_memory == (sum(map(len, parts)) < run_rows)
    for rows in zip(*found, strict=True):
        num_runs = sum(len(records.runs) for records in both)
        keys = [key for key, _ in chain(*rows)]
        most = max((keys.count(key) for key in keys), default=0)
        assert len(keys) <= max(run_rows, stride) + (2 * num_runs + 1) * stride + most


@given(
    sizes=st.lists(st.integers(0, 7), max_size=9),
    stride=st.integers(1, 4),
    bounds=st.tuples(*[st.none() | st.integers(0, 70)] * 2),
)
def test_a_run_written_in_parts_is_read_by_ranges(
    sizes: list[int], stride: int, bounds: tuple[int | None, int | None]
) -> None:
    records = np.zeros(sum(sizes), DTYPE)
    records["key"] = np.arange(len(records)) // 2
    low, high = bounds
    with patch.object(record_sorter, "STRIDE", stride):
        writer = RunWriter(SpillFile(), DTYPE)
        for part in np.split(records, np.cumsum(sizes))[:-1] if sizes else []:
            writer.append(part)
        run = writer.finish()
        by_hand = [key for key in records["key"].tolist() if (low or 0) <= key and (high is None or key < high)]
        assert run.read(bounds)["key"].tolist() == by_hand
    assert run.keys.tolist() == records["key"][::stride].tolist()


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_sorter, "RUN_ROWS", 1)
    monkeypatch.setattr(record_sorter.tempfile, "mkstemp", fail)
    with pytest.raises(UserError, match=r"no space left to sort labels in .*TMPDIR"):
        sort([[(1, 1.0)]])
