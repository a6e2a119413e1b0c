from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from pipeline.prepare.build import build
from pipeline.prepare.event_filter import EventFilter
from pipeline.prepare.moments import Moments
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.rules import ACTIONS, Aggregate, Range, Rules, compute_outlier_limits, read_ranges
from pipeline.prepare.sources.table import Table
from pipeline.prepare.splits import SplitRule
from pipeline.schema import UserError
from tests.faults.conftest import cases
from tests.prepared import Row, assert_same, expected, read_prepared

HALVES = SplitRule(split_fractions=(0.5, 0.25, 0.25))
ALL_TRAIN = SplitRule(split_fractions=(1.0, 0.0, 0.0))

rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e", None]),
        st.sampled_from([-0.5, 0.0, 0.25, 0.75, 3.0]),
        st.sampled_from(["HR", "RR", "ü"]),
        st.sampled_from([None, -80.25, 0.0, 1.0, 1.5, 2.0, 300.0, 7e5]),
    ),
    min_size=1,
    max_size=60,
)
ranges = st.dictionaries(
    st.sampled_from(["HR", "ü", "no such"]),
    st.builds(
        Range,
        low=st.sampled_from([-math.inf, -100.0, 0.0, 0.1]),
        high=st.sampled_from([math.inf, 0.1, 1.5, 200.0]),
        action=st.sampled_from(ACTIONS),
    ),
)
rules = st.builds(
    Rules,
    ranges=ranges,
    outlier_std=st.sampled_from([None, 0.9, 1.3, 4.0]),
    outlier_action=st.sampled_from(ACTIONS),
    aggregate=st.sampled_from(get_args(Aggregate)),
    min_events=st.sampled_from([1, 3, 9]),
    min_count=st.sampled_from([1, 4, 12]),
)


def prepare(rows: list[Row], folder: Path, options: BuildOptions) -> dict[str, Any]:
    schema = {"patient_id": pl.String, "minute": pl.Float64, "variable": pl.String, "value": pl.Float64}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / "rows.parquet")
    return build(Table(path=folder / "rows.parquet"), folder / "out", options)


@settings(max_examples=cases(25, 60))
@given(rows, rules)
def test_rules_do_what_the_naive_reference_says(rows: list[Row], rules: Rules) -> None:
    naive = expected(rows, HALVES, {}, rules=rules)
    options = BuildOptions(split_rule=HALVES, rules=rules, events_per_shard=10**6)
    with TemporaryDirectory() as name:
        if len(naive.vocabulary) == 2 or not naive.patients["train"]:
            with pytest.raises(UserError, match=r"train split|no row can be used"):
                prepare(rows, Path(name), options)
            return
        summary = prepare(rows, Path(name), options)
        assert_same(read_prepared(Path(name) / "out"), naive)
        manifest = Manifest.load(Path(name) / "out")
    assert summary["events_in"] == summary["events_written"] + sum(summary["rejects"].values()) == len(rows)
    assert Rules.from_options(json.loads(json.dumps(manifest.options))) == rules
    assert summary["unknown_variable_events"] == sum(summary["unknown_variables"].values())


def hand(rules: Rules, tmp_path: Path, rows: list[Row]) -> tuple[list[Any], dict[str, Any], list[dict[str, Any]]]:
    """Sets of the one patient with raw values, the summary, and the vocabulary."""
    summary = prepare(rows, tmp_path, BuildOptions(split_rule=ALL_TRAIN, rules=rules))
    vocabulary = pl.read_parquet(tmp_path / "out" / "vocabulary.parquet").to_dicts()
    ((_, _, sets),) = read_prepared(tmp_path / "out").patients["train"]
    raw = [
        (
            minute,
            [
                (row["variable"], None if value is None else round(value * row["std"] + row["mean"], 4))
                for row, value in ((vocabulary[code], value) for code, value in events)
            ],
        )
        for minute, events in sets
    ]
    return raw, summary, vocabulary


DAY: list[Row] = [
    ("p", 0.25, "HR", 60.0), ("p", 0.5, "HR", 90.0), ("p", 0.5, "HR", 70.0), ("p", 0.75, "HR", None),
    ("p", 0.0, "RR", None), ("p", 0.5, "RR", None), ("p", 1.0, "HR", 80.0),
]  # fmt: skip


@pytest.mark.parametrize(("aggregate", "first"), [("mean", 73.3333), ("last", 90.0)])
def test_one_event_of_a_variable_in_a_set(tmp_path: Path, aggregate: Any, first: float) -> None:
    sets, summary, vocabulary = hand(Rules(aggregate=aggregate), tmp_path, DAY)
    # An event merged of several is one of the last of their minutes: before it, its value was not known.
    assert sets == [(0.0, [("RR", None), ("HR", first)]), (1.0, [("HR", 80.0)])]
    assert summary["rejects"] == {"aggregated": 4}
    assert [row["count"] for row in vocabulary] == [0, 0, 2, 1]
    assert vocabulary[2]["mean"] == pytest.approx((first + 80) / 2, abs=1e-4)  # of what is kept


def test_rejected_and_clipped_outliers_leave_statistics_of_what_is_kept(tmp_path: Path) -> None:
    values = [1.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 62.0]
    rows: list[Row] = [("p", float(minute), "HR", value) for minute, value in enumerate(values)]
    high = np.mean(values) + 2 * np.std(values)
    for action in ACTIONS:
        (tmp_path / action).mkdir()
        sets, summary, vocabulary = hand(Rules(outlier_std=2.0, outlier_action=action), tmp_path / action, rows)
        assert vocabulary[2]["high"] == pytest.approx(high)
        kept = values[:-1] if action == "reject" else [*values[:-1], high]
        assert [value for _, ((_, value),) in sets] == pytest.approx(kept, abs=1e-3)
        assert vocabulary[2]["mean"] == pytest.approx(np.mean(kept))
        assert vocabulary[2]["std"] == pytest.approx(np.std(kept))
        counts = ({"outlier": 1}, 0) if action == "reject" else ({}, 1)
        assert (summary["rejects"], summary["clipped"]["outlier"]) == counts


def test_ranges_by_hand(tmp_path: Path) -> None:
    (tmp_path / "ranges.csv").write_text("variable,low,high,action\nHR,65,85,clip\nRR,,10,reject\nTemp,1,2,\n")
    rows: list[Row] = [*DAY, ("p", 0.0, "RR", 11.0), ("p", 0.0, "RR", -1e9)]
    sets, summary, _ = hand(Rules(ranges=read_ranges(tmp_path / "ranges.csv")), tmp_path, rows)
    assert [value for name, value in sets[0][1] if name == "HR"] == [65, 70, 85, None]
    assert -1e9 in [value for _, value in sets[0][1]]
    assert summary["rejects"] == {"out_of_range": 1}
    assert summary["clipped"]["out_of_range"] == 2
    assert summary["ranges_of_unknown_variables"] == ["Temp"]
    rejects = pl.read_parquet(tmp_path / "out" / "rejects.parquet").rows()
    assert rejects == [("out_of_range", "rows.parquet", 8, "p", "0.0", "RR", "11.0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variable,low\nHR,1\n", "no column 'high'"),
        ("variable,low,high\nHR,2,1\n", "the row of 'HR' is no range"),
        ("variable,low,high\nHR,x,1\n", "the row of 'HR' is no range"),
        ("variable,low,high\nHR,,-inf\n", "the row of 'HR' is no range"),
        ("variable,low,high\nHR,1e39,\n", "the row of 'HR' is no range"),
        ("variable,low,high\nHR,nan,1\n", "the row of 'HR' is no range"),
        ("variable,low,high,action\nHR,1,2,drop\n", "action is clip or reject"),
        ("variable,low,high\nHR,1,2\nHR,1,3\n", "'HR' stands there 2 times"),
    ],
)
def test_a_range_file_that_makes_no_sense_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ranges.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_ranges(tmp_path / "ranges.csv")


def test_short_patients_and_rare_variables(tmp_path: Path) -> None:
    rows: list[Row] = [*DAY, ("q", 0.0, "HR", 500.0), ("q", 1.0, "Temp", 37.0), ("p", 2.0, "Temp", 36.0)]
    sets, summary, vocabulary = hand(Rules(min_events=3, min_count=2), tmp_path, rows)
    assert [row["variable"] for row in vocabulary] == ["<padding>", "<unknown>", "HR", "RR"]
    assert vocabulary[2]["mean"] == 75
    assert sets[-1] == (2.0, [("<unknown>", 36.0)])
    assert summary["rejects"] == {"short_patient": 2}
    assert summary["unknown_variables"] == {"Temp": 1}
    assert summary["patients_without_events_first"] == ["q"]


def test_limits_are_of_variables_that_vary() -> None:
    train = Moments.measure(["a", "b", "c"], np.array([0, 0, 1, 2]), np.array([1, 3, 5, np.nan], np.float32))
    assert compute_outlier_limits(train, Rules(outlier_std=2.0)) == {"a": (0.0, 4.0)}
    assert compute_outlier_limits(train, Rules()) == {}


def test_nothing_to_sift() -> None:
    schema = {"patient": pl.Int32, "set": pl.Float64, "variable": pl.Int32, "value": pl.Float32, "minute": pl.Float64}
    events = EventFilter(pl.DataFrame(schema=schema))
    events.limit([], {"a": (0, 1)}, "clip")
    events.aggregate("mean")
    events.drop_short(3)
    assert events.kept.height == events.num_clipped == len(events.rejected) == 0
