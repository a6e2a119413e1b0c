from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.prepare import merge
from pipeline.prepare.build import build
from pipeline.prepare.merge import group_spills, merge_spills, name_merged
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.publish import WORK
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.spill_files import read_partition, write_spill
from pipeline.prepare.splits import SplitRule
from tests.pipeline.prepare.test_build import shard_bytes


@pytest.mark.parametrize(
    ("num_spills", "groups"),
    [(3, []), (4, [(0, 1)]), (5, [(0, 1, 2)]), (6, [(0, 1), (2, 3, 4)]), (7, [(0, 1, 2), (3, 4, 5)]), (0, [])],
)
def test_as_few_spills_are_merged_as_leave_three(num_spills: int, groups: list[tuple[int, ...]]) -> None:
    found = group_spills([str(number) for number in range(num_spills)], 3)
    assert [tuple(map(int, group)) for group in found] == groups


@given(st.integers(0, 3000), st.integers(2, 40))
def test_merging_leaves_at_most_so_many_files(num_spills: int, max_spills: int) -> None:
    spills = [str(number) for number in range(num_spills)]
    groups = group_spills(spills, max_spills)
    merged = [name for group in groups for name in group]
    assert merged == spills[: len(merged)]
    assert len(groups) + num_spills - len(merged) <= max_spills
    assert all(len(group) <= max(max_spills, math.ceil(num_spills / max_spills)) for group in groups)
    assert len(merged) <= max(0, 2 * (num_spills - max_spills))  # little more than is too much


Row = tuple[int, float | None, int, float | None, int]
ROWS = st.lists(
    st.tuples(
        st.integers(0, 5), st.none() | st.integers(0, 9).map(float), st.integers(0, 4), st.none() | st.just(2.5),
        st.integers(0, 300),
    ),
    max_size=12,
)  # fmt: skip


def make_spill(path: Path, rows: list[Row], *, has_sets: bool, files: list[str]) -> None:
    """Write a spill of rows (patient, minute, variable, value, row); patient 9 has no row."""
    patients, variables = [f"p{row[0]}" for row in rows], [f"v{row[2]}" for row in rows]
    columns: dict[str, Any] = {
        "patient_id": pl.Series(patients, dtype=pl.Enum(sorted(set(patients)))),
        "minute": pl.Series([row[1] for row in rows], dtype=pl.Float64),
        "variable": pl.Series(variables, dtype=pl.Enum(sorted(set(variables)))),
        "value": pl.Series([row[3] for row in rows], dtype=pl.Float32),
        "row": pl.Series([row[4] for row in rows], dtype=pl.Int64),
        "file": pl.Series([row[4] % len(files) for row in rows], dtype=pl.UInt32),
    }
    if has_sets and rows:
        columns["set_index"] = pl.Series([row[4] % 3 for row in rows], dtype=pl.Int64)
    ids = sorted({*patients, "p9"})
    write_spill(path, pl.DataFrame(columns), files, ids, SplitRule().hash_patients(ids)[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=5), st.booleans(), st.integers(1, 4), st.sampled_from([3, 1 << 22]))
def test_partitions_of_merged_spills_are_those_of_the_spills(
    tmp_path_factory: pytest.TempPathFactory, spills: list[list[Row]], has_sets: bool, partitions: int, step_rows: int
) -> None:
    work = tmp_path_factory.mktemp("work")
    (work / "merged").mkdir()
    names = [f"{number}.columns" for number in range(len(spills))]
    for number, (name, rows) in enumerate(zip(names, spills, strict=True)):
        make_spill(work / name, rows, has_sets=has_sets, files=[f"f{number}", "shared"])
    with patch.object(merge, "STEP_ROWS", step_rows):
        merged = merge_spills(work, 0, names)
    assert merged.num_rows == sum(map(len, spills))
    for partition in range(partitions):
        one = read_partition([work / name_merged(0)], partition, partitions)
        many = read_partition([work / name for name in names], partition, partitions)
        assert (one.patient_ids, one.variables) == (many.patient_ids, many.variables)
        by_patient = np.argsort(many.patient, kind="stable")
        mine = np.argsort(one.patient, kind="stable")
        for column in ("patient", "variable", "minute", "value", "set_index"):
            left, right = getattr(one, column), getattr(many, column)
            assert (left is None) == (right is None) == (column == "set_index" and not (has_sets and any(spills)))
            if right is not None and len(right):
                np.testing.assert_array_equal(left[mine], right[by_patient], strict=True)
        files, rows = one.find_sources(mine)
        other_files, other_rows = many.find_sources(by_patient)
        assert files.to_pylist() == other_files.to_pylist()
        assert rows.tolist() == other_rows.tolist()


@pytest.mark.parametrize(
    "lost", [None, "merged/00000.columns", "journal/merge/000001.json", "journal/read/000002.json"]
)
def test_a_run_that_was_stopped_while_it_merged_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 5})
    source, options = Synthetic(num_patients=50), BuildOptions(events_per_shard=5000)
    build(source, tmp_path / "whole", options)
    monkeypatch.setattr("pipeline.prepare.stages.MAX_SPILLS", 4)
    left: list[list[str]] = []

    def stop(*_: object) -> None:
        left.append(sorted(path.name for path in (tmp_path / "out" / WORK / "spills").iterdir()))
        raise OSError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.prepare.stages.sort_partition", stop)
        with pytest.raises(OSError, match="stopped"):
            build(source, tmp_path / "out", options)
    assert left == [[f"{number:05d}.00000.columns" for number in (8, 9)]]  # 0 to 7 are merged, four at a time
    if lost:
        (tmp_path / "out" / WORK / lost).unlink()

    def note(stage: str, *, done: int, total: int, rows: int) -> None:
        seen.setdefault(stage, done)

    seen: dict[str, int] = {}
    build(source, tmp_path / "out", options, progress=note)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    # What is lost is made again: the pieces of a merged spill, or, without a result, all whose spills are gone.
    assert seen["read"] == {None: 10, "merged/00000.columns": 6, "journal/merge/000001.json": 6}.get(lost, 2)
