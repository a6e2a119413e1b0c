"""Numbers that are read as numbers mean what their texts mean, and rejects have the texts that came."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.prepare.clean import clean
from pipeline.prepare.sources import csv_files
from pipeline.prepare.sources import table as module
from pipeline.prepare.sources.table import Table

numbers = st.sampled_from(["0", "7", "1.50", "-0.0", "1e3", "007", ".5", "0.30000000000000004", "9007199254740993"])
others = st.sampled_from(
    ["", " ", " 1", "2 ", "+1", "nan", "-nan", "inf", "1e400", "NA", "true", '"3"', '" 4"', '""', "x", "1h"]
)
names = st.sampled_from(["a", "a", "b", "", " a", "1.0", '"a,b"'])
files = st.lists(
    st.lists(st.tuples(names, numbers | others, names, numbers | others), max_size=6)
    | st.lists(st.tuples(names, numbers, names, numbers), max_size=6),
    min_size=1,
    max_size=4,
)


def read_parts(folder: Path) -> list[tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]:
    """Return kept and rejected rows of all parts, in their order."""
    source = Table(path=folder)
    cleaned = [clean(raw) for piece in source.pieces() for raw in source.read(piece)]
    return [tuple(frame.cast({pl.Enum: pl.String}).rows() for frame in frames) for frames in cleaned]  # type: ignore[misc]


@settings(max_examples=40, deadline=None)
@given(files, st.integers(1, 12), st.integers(8, 80))
def test_numbers_are_what_their_texts_mean(
    rows: list[list[tuple[str, ...]]], chunk_rows: int, piece_bytes: int
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ROWS", chunk_rows)
        for at, each in enumerate(rows):
            text = "".join(",".join(cells) + "\n" for cells in [("patient_id", "minute", "variable", "value"), *each])
            (Path(name) / f"{at}.csv").write_text(text)
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        patch.setattr(csv_files, "PIECE_BYTES", piece_bytes)
        patch.setattr(csv_files, "BLOCK_BYTES", piece_bytes)
        found = read_parts(Path(name))
        patch.setattr(Table, "_find_numbers", lambda *_: set())
        assert found == read_parts(Path(name))


def test_nan_with_a_sign_is_no_number_and_not_missing(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("patient_id,minute,variable,value\np,0,HR,1\np,1,HR,-nan\np,2,HR,nan\n")
    assert read_parts(tmp_path)[0][1] == [("bad_value", 0, 2, "p", "1", "HR", "-nan")]


def test_numbers_are_read_as_numbers_where_all_are(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("patient_id,minute,variable,value\np,00,HR,080\n,01,HR,1.50\n")
    (tmp_path / "2.csv").write_text("patient_id,minute,variable,value\np,1,HR,\n")
    source = Table(path=tmp_path)
    (raw,) = (raw for piece in source.pieces() for raw in source.read(piece))
    assert raw.rows.schema["minute"] == raw.rows.schema["value"] == pl.Float64
    assert raw.rows["value"].to_list() == [80, 1.5, None]
    _, rejected = clean(raw)
    assert rejected.rows() == [("no_patient", 0, 2, None, "01", "HR", "1.50")]
    (tmp_path / "2.csv").write_text("patient_id,minute,variable,value\np,1,HR,NA\n")
    (raw,) = (raw for piece in source.pieces() for raw in source.read(piece))
    assert raw.rows["value"].to_list() == ["080", "1.50", "NA"]
    for more in ({"decimal_comma": True}, {"text_events": True}, {"categories": {"HR=NA": 1.0}}):
        (raw, *_) = (raw for piece in source.pieces() for raw in Table(path=tmp_path, **more).read(piece))  # type: ignore[arg-type]
        assert raw.read_texts is None
