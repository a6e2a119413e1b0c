from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.prepare import arrow_files
from pipeline.prepare.arrow_files import load_table, read_table, write_parquet, write_table

SCHEMA = pa.schema({"number": pa.int64(), "name": pa.string()})


def make_table(start: int, stop: int) -> pa.Table:
    return pa.table({"number": range(start, stop), "name": map(str, range(start, stop))}, SCHEMA)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 20)))
def test_row_groups_are_alike_however_rows_are_cut_into_tables(
    sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_files, "ROWS_A_GROUP", 8)
    monkeypatch.setattr(arrow_files, "TABLES_HELD", 3)
    stops = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    write_parquet(tmp_path / "cut", SCHEMA, (make_table(start, stop) for start, stop in pairwise(stops)))
    write_parquet(tmp_path / "whole", SCHEMA, [make_table(0, stops[-1])])
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    file = pq.ParquetFile(tmp_path / "cut")
    assert file.read().equals(make_table(0, stops[-1]))
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [
        min(8, stops[-1] - start) for start in range(0, stops[-1], 8)
    ]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    for table in (make_table(0, 5), make_table(0, 0)):
        write_table(tmp_path / "table", table)
        assert read_table(tmp_path / "table").equals(table)
        assert load_table(tmp_path / "table").equals(table)
