"""Splits that an input gives are found by partitions as a dictionary says, however few are held at a time."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import record_sorter
from pipeline.prepare.known_splits import assign_known_splits, read_known_splits, write_known_splits
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.sources.source import GivenSplits
from pipeline.schema import SPLITS, UserError
from tests.prepared import assign_splits

NAMES = [*"abcdef", "é", "01", "1"]


def give(parts: list[list[tuple[str, str]]]) -> GivenSplits:
    def read() -> Iterator[pl.DataFrame]:
        for part in parts:
            yield pl.DataFrame(part, schema={"patient_id": pl.String, "split": pl.String}, orient="row")

    return GivenSplits(Path("splits.csv"), read)


def expect_refusal(rows: list[tuple[str, str]]) -> str | None:
    """The first patient by name in two splits, and its place among those of the first of these by name."""
    splits = {name: sorted({split for other, split in rows if other == name}) for name, _ in rows}
    wrong = min((name for name, found in splits.items() if len(found) > 1), default=None)
    if wrong is None:
        return None
    first, second = splits[wrong][:2]
    number = [name for name, split in rows if split == first].index(wrong) + 1
    return f"splits.csv: patient number {number} of {first} is in {second} too; leave it in one"


@given(
    rows=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(SPLITS)), max_size=12),
    is_function=st.booleans(),
    size=st.integers(1, 5),
    run_rows=st.integers(1, 9),
    num_partitions=st.integers(1, 3),
    is_hidden=st.booleans(),
)
def test_splits_are_those_of_a_dictionary(
    rows: list[tuple[str, str]], is_function: bool, size: int, run_rows: int, num_partitions: int, is_hidden: bool
) -> None:
    if is_function:  # of the name
        rows = [(name, dict(rows)[name]) for name, _ in rows]
    splits = give([rows[start : start + size] for start in range(0, len(rows), size)])
    options, refusal = BuildOptions(pseudonyms=Pseudonyms(b"k" * 32) if is_hidden else None), expect_refusal(rows)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(record_sorter, "RUN_ROWS", run_rows),
        patch.object(record_sorter, "STRIDE", 2),
    ):
        if refusal is not None:
            with pytest.raises(UserError, match=f"^{re.escape(refusal)}$"):
                write_known_splits(splits, options, Path(folder))
            return
        write_known_splits(splits, options, Path(folder))
        known = [read_known_splits(Path(folder), number, num_partitions) for number in range(num_partitions)]
    hide = options.pseudonyms.hide if options.pseudonyms else str
    rule, given_split = options.split_rule, {hide(name): split for name, split in rows}
    names = sorted(map(hide, NAMES))
    partition = [int(by) * num_partitions >> 63 for by in rule.hash_patients(names)[0]]
    for number, part in enumerate(known):
        own = [name for name, at in zip(names, partition, strict=True) if at == number]
        assert len(part["hash"]) == sum(hide(name) in own for name, _ in rows)
        found, by_hash = assign_known_splits(own, part, rule)
        by_rule = [SPLITS[at] for at in assign_splits(rule, own)]
        assert [SPLITS[at] for at in found] == [given_split.get(*pair) for pair in zip(own, by_rule, strict=True)]
        assert by_hash.tolist() == [name not in given_split for name in own]
