from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare.moments import Moments
from pipeline.prepare.splits import SplitRule
from pipeline.prepare.vocabulary import make_vocabulary, vocabulary_fingerprint
from tests.prepared import assign_splits

NAMES = ["a", "b", "ü"]
Events = list[tuple[int, float]]
events = st.lists(st.tuples(st.integers(0, 2), st.floats(-1e6, 1e6, width=32) | st.just(np.nan)), max_size=30)


def moments(part: Events, names: list[str] = NAMES) -> Moments:
    variable = np.array([variable for variable, _ in part], dtype=np.int32)
    return Moments.measure(names, variable, np.array([value for _, value in part], dtype=np.float32))


@given(st.lists(events, min_size=1, max_size=5))
def test_merged_moments_are_those_of_all_events(parts: list[Events]) -> None:
    merged = Moments.merge([moments(part) for part in parts])
    assert merged.variables == NAMES
    for place in range(len(NAMES)):
        values = np.array([value for part in parts for variable, value in part if variable == place])
        numbers = values[~np.isnan(values)]
        assert merged.count[place] == len(values)
        assert merged.num_values[place] == len(numbers)
        if len(numbers):
            scale = np.abs(numbers).max()
            assert merged.mean[place] == pytest.approx(numbers.mean(), rel=1e-12, abs=1e-12 * scale)
            assert merged.std[place] == pytest.approx(numbers.std(), rel=1e-9, abs=1e-9 * scale)


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_constant_has_no_deviation_at_all(value: float, sizes: list[int]) -> None:
    merged = Moments.merge([moments([(0, value)] * size) for size in sizes])
    assert merged.mean[0] == value
    assert merged.std[0] == 0


@given(events, st.data())
def test_moments_are_of_the_train_split_and_are_loaded_as_they_were_saved(
    tmp_path_factory: pytest.TempPathFactory, part: Events, data: st.DataObject
) -> None:
    in_train = np.array([data.draw(st.booleans()) for _ in part], np.bool_)
    variable = np.array([variable for variable, _ in part], dtype=np.int32)
    value = np.array([value for _, value in part], dtype=np.float32)
    measured = Moments.measure(NAMES, variable, value, in_train)
    alone = moments([event for event, inside in zip(part, in_train, strict=True) if inside])
    path = tmp_path_factory.mktemp("moments") / "some.found"
    measured.save(path)
    loaded = Moments.load(path)
    assert loaded.variables == NAMES
    assert loaded.everywhere.tolist() == np.bincount(variable, minlength=3).tolist()
    for name in set(Moments.__slots__) - {"variables", "everywhere"}:
        assert getattr(loaded, name).tobytes() == getattr(measured, name).tobytes() == getattr(alone, name).tobytes()


def test_a_large_mean_does_not_swallow_a_small_deviation() -> None:
    merged = Moments.merge([moments([(0, 16_777_214.0)] * 1000), moments([(0, 16_777_216.0)] * 1000)])
    assert merged.mean[0] == 16_777_215
    assert merged.std[0] == 1


def test_parts_may_know_different_variables() -> None:
    merged = Moments.merge([moments([(0, 1.0)], ["b"]), moments([(0, 5.0), (1, 3.0)], ["a", "b"]), moments([], [])])
    assert merged.variables == ["a", "b"]
    assert merged.count.tolist() == [1, 2]
    assert merged.mean.tolist() == [5, 2]
    assert merged.std.tolist() == [0, 1]


def test_vocabulary_by_hand() -> None:
    train = moments([(0, 1.0), (0, 3.0), (2, np.nan)])  # nothing of b
    limits, descriptions = {"ü": (1.0, 9.0)}, {"a": "of a", "b": "of b"}
    given = {"ü": (7.0, 2.0), "b": (1.0, 1.0)}
    vocabulary = make_vocabulary(train, given, limits=limits, descriptions=descriptions).to_pydict()
    assert vocabulary == {
        "code": [0, 1, 2, 3],
        "variable": ["<padding>", "<unknown>", "a", "ü"],
        "count": [0, 0, 2, 1],
        "mean": [0, 0, 2, 7],
        "std": [1, 1, 1, 2],
        "low": [None, None, None, 1],
        "high": [None, None, None, 9],
        "description": [None, None, "of a", None],
    }


def test_rare_variables_are_left_out_unless_they_have_limits() -> None:
    train = moments([(0, 1.0), (0, 3.0), (1, 1.0), (2, 1.0)])
    for limits, known in (({}, ["a"]), ({"b": (0.0, 1.0)}, ["a", "b"])):
        assert make_vocabulary(train, {}, min_count=2, limits=limits)["variable"].to_pylist()[2:] == known


def test_a_variable_without_numbers_or_spread_is_scaled_by_one() -> None:
    vocabulary = make_vocabulary(moments([(0, 4.0), (0, 4.0), (1, np.nan)]), {}).to_pydict()
    assert vocabulary["mean"][2:] == [4, 0]
    assert vocabulary["std"][2:] == [1, 1]


def test_the_fingerprint_tells_vocabularies_apart() -> None:
    some = [
        make_vocabulary(moments([(0, 1.0)]), {}),
        make_vocabulary(moments([(1, 1.0)]), {}),
        make_vocabulary(moments([(0, 2.0)]), {}),
        make_vocabulary(moments([(0, 1.0), (0, 1.5)]), {}),
        make_vocabulary(moments([(0, 1.0), (1, 1.0)]), {}),
        make_vocabulary(moments([(0, 1.0)], ["ab"]), {}),
    ]
    assert len({vocabulary_fingerprint(vocabulary) for vocabulary in some}) == len(some)
    again = make_vocabulary(moments([(0, 1.0), (0, 1.0)]), {})  # counts are not part of it
    assert vocabulary_fingerprint(again) == vocabulary_fingerprint(some[0])


def test_splits_follow_the_fractions_and_the_id_alone() -> None:
    names = [f"patient {number}" for number in range(20_000)]
    rule = SplitRule(split_fractions=(0.5, 0.2, 0.3))
    splits = assign_splits(rule, names)
    assert np.bincount(splits) / len(names) == pytest.approx([0.5, 0.2, 0.3], abs=0.015)
    assert assign_splits(rule, names[::-3]).tolist() == splits[::-3].tolist()
    assert assign_splits(SplitRule(split_fractions=(0.5, 0.2, 0.3), split_seed=1), names).tolist() != splits.tolist()
    assert set(assign_splits(SplitRule(split_fractions=(0.5, 0.0, 0.5)), names).tolist()) == {0, 2}
    assert set(assign_splits(SplitRule(split_fractions=(1.0, 0.0, 0.0)), names).tolist()) == {0}


def test_the_split_says_nothing_of_the_partition() -> None:
    names = [f"{number}" for number in range(20_000)]
    by_partition, by_split = SplitRule().hash_patients(names)
    assert abs(np.corrcoef(by_partition.astype(float), by_split.astype(float))[0, 1]) < 0.03


def test_splits_are_the_same_for_ever() -> None:
    """Data sets prepared by an earlier version must be extended by a later one."""
    assert assign_splits(SplitRule(), [str(number) for number in range(16)]).tolist() == [
        1,
        1,
        1,
        1,
        0,
        1,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
