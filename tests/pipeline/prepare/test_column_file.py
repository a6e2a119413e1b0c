from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import column_file
from pipeline.prepare.column_file import open_columns, write_columns

TEXTS = st.lists(st.text(max_size=5), max_size=20)


def test_ranges_and_texts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "some.columns"
    arrays = {"small": np.arange(5, dtype=np.uint8), "empty": np.zeros(0, np.float32), "large": np.arange(3) * 2**40}
    write_columns(path, arrays, {"name": pa.array(["a", "", "üé"]), "nobody": pa.array([], pa.string())})
    with open_columns(path) as file:
        assert file.read("small", 1, 3).tolist() == [1, 2]
        assert file.read("empty").dtype == np.float32
        assert file.read("large").tolist() == [0, 2**40, 2**41]
        assert file.read_texts("name").to_pylist() == ["a", "", "üé"]
        assert file.read_texts("name", 1, 3).to_pylist() == ["", "üé"]
        assert file.read_texts("nobody").to_pylist() == []
    assert [found.name for found in tmp_path.iterdir()] == ["some.columns"]


@given(TEXTS, st.data())
def test_any_range_of_texts_is_the_range_of_the_list(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("columns") / "texts.columns"
    start = data.draw(st.integers(0, len(texts)))
    stop = data.draw(st.integers(start, len(texts)))
    sliced = pa.array(["before", *texts, "after"], pa.string()).slice(1, len(texts))
    write_columns(path, {}, {"name": sliced})
    with open_columns(path) as file:
        assert file.read_texts("name", start, stop).to_pylist() == texts[start:stop]


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(0, 51), st.sampled_from([1, 3, 512]))
def test_a_search_finds_what_numpy_finds(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], sought: int, few: int
) -> None:
    path = tmp_path_factory.mktemp("columns") / "sorted.columns"
    in_order = np.sort(np.array(values, np.uint64))
    write_columns(path, {"hash": in_order})
    with patch.object(column_file, "FEW", few), open_columns(path) as file:
        assert file.search("hash", sought) == np.searchsorted(in_order, sought)


def test_a_header_longer_than_the_first_read_is_read(tmp_path: Path) -> None:
    arrays = {f"array number {number}": np.arange(number) for number in range(200)}
    write_columns(tmp_path / "many.columns", arrays)
    with open_columns(tmp_path / "many.columns") as file:
        assert all(file.read(name).tolist() == array.tolist() for name, array in arrays.items())


def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "some.columns"
    write_columns(path, {"a": np.arange(1000)})
    path.write_bytes(path.read_bytes()[:-1])
    with open_columns(path) as file, pytest.raises(OSError, match="1 bytes too early"):
        file.read("a")
