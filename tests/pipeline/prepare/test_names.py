from __future__ import annotations

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import names

texts = st.lists(st.sampled_from([None, "", " ", "a", "A", "ü", "7", "7.0"]), max_size=30)


def upper(values: pl.Series) -> pl.Series:
    return values.cast(pl.String).str.to_uppercase()


@given(texts)
def test_names_are_the_texts_of_their_rows(values: list[str | None]) -> None:
    column = pl.Series("n", values, dtype=pl.String)
    encoded = names.encode(column)
    assert isinstance(encoded.dtype, pl.Enum)
    assert encoded.name == "n"
    assert encoded.cast(pl.String).to_list() == values
    again = names.encode(encoded, upper)  # equal texts are one name
    assert again.cast(pl.String).to_list() == upper(column).to_list()
    assert names.test(encoded, lambda name: name == "a").to_list() == (column == "a").to_list()


@given(st.lists(st.tuples(st.sampled_from([None, "", "a", "A", "7.0"]), st.integers(1, 30)), max_size=8))
def test_names_of_long_runs(runs: list[tuple[str | None, int]]) -> None:
    values = [text for text, size in runs for _ in range(size)]
    encoded = names.encode(pl.Series("n", values, dtype=pl.String), upper)
    assert isinstance(encoded.dtype, pl.Enum)
    assert encoded.name == "n"
    assert encoded.cast(pl.String).to_list() == [None if text is None else text.upper() for text in values]
    assert encoded.dtype.categories.to_list() == list(
        dict.fromkeys(text.upper() for text in values if text is not None)
    )


@given(texts)
def test_names_that_are_present(values: list[str | None]) -> None:
    encoded = names.encode(pl.Series(["b", *values, "c"], dtype=pl.String))[1:-1]  # b and c have no row
    assert sorted(names.list_present(encoded)) == sorted({text for text in values if text is not None})
    assert names.list_present(names.nothing("n", 3)) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([3, None, 3, -1]), ["3", None, "3", "-1"]),
        (pl.Series([1.5, None, 1.5]), ["1.5", None, "1.5"]),
        (pl.Series([True, False]), ["true", "false"]),
        (pl.Series([None, None]), [None, None]),
        (pl.Series([], dtype=pl.Int64), []),
    ],
)
def test_numbers_have_names_too(values: pl.Series, expected: list[str | None]) -> None:
    assert names.encode(values).cast(pl.String).to_list() == expected


@given(st.lists(texts, min_size=1, max_size=4))
def test_columns_of_other_names_make_one(parts: list[list[str | None]]) -> None:
    columns = [names.encode(pl.Series("n", part, dtype=pl.String)) for part in parts]
    assert names.concat(columns).cast(pl.String).to_list() == [value for part in parts for value in part]


@given(st.lists(texts, max_size=4))
def test_dictionaries_of_several_chunks_are_one_column(parts: list[list[str | None]]) -> None:
    kind = pa.dictionary(pa.int32(), pa.string())
    chunks = pa.chunked_array([pa.array(part, pa.string()).dictionary_encode() for part in parts], kind)
    column = names.from_dictionary("n", chunks)
    assert column.name == "n"
    assert column.cast(pl.String).to_list() == [value for part in parts for value in part]


def test_a_name_that_is_no_text_is_found() -> None:
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    chunks = pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), bad)])
    with pytest.raises(pa.ArrowInvalid, match="UTF8"):
        names.from_dictionary("n", chunks)
