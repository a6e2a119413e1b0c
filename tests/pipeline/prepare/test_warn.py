from __future__ import annotations

import numpy as np

from pipeline.dataset.tasks import SampleCounts
from pipeline.prepare.moments import Moments
from pipeline.prepare.scales import Scale
from pipeline.prepare.warn import find_warnings, name_some


def measure(**values: list[float]) -> Moments:
    names = sorted(values)
    empty = np.zeros(0)
    variable = np.repeat(np.arange(len(names)), np.array([len(values[name]) for name in names], dtype=np.int64))
    return Moments.measure(
        names, variable, np.concatenate([empty, *(values[name] for name in names)]).astype(np.float32)
    )


def test_a_value_that_makes_most_of_the_variance_is_said() -> None:
    normal = [float(value % 7) for value in range(200)]
    spread, flattened, few = normal, [*normal, 9999.0], [1.0, 2.0, 9999.0]
    (warning,) = find_warnings(measure(spread=spread, flattened=flattened, few=few), {})
    assert warning.startswith("variable 'flattened': a single value makes up 100% of the variance")
    low = find_warnings(Moments.merge([measure(a=normal), measure(a=[-9999.0])]), {})
    assert len(low) == 1


def test_constants_are_said_but_not_variables_of_one_value() -> None:
    assert find_warnings(measure(a=[1.0, 1.0], b=[1.0], c=[1.0, 2.0]), {}) == ["always the same value: 'a'"]


def test_splits_whose_labels_are_all_alike_are_said() -> None:
    def counts(labelled: int, positive: int) -> SampleCounts:
        return SampleCounts(
            num_samples=5, num_patients=5, num_labelled=labelled, class_counts=[labelled - positive, positive]
        )

    warnings = find_warnings(measure(), {"train": counts(4, 2), "valid": counts(3, 0), "test": counts(0, 0)})
    assert [warning.split(":")[0] for warning in warnings] == [
        "split valid has no positive label",
        "split test has no label",
    ]
    assert find_warnings(measure(), {"train": counts(0, 0)}) == []


def test_splits_that_are_empty_on_purpose_are_not_warned_of() -> None:
    """With --like all are in one split; otherwise a split without anybody lacks outcomes."""
    some = SampleCounts(num_samples=5, num_patients=5, num_labelled=5, class_counts=[3, 2])
    nobody = SampleCounts(num_samples=0, num_patients=0, num_labelled=0, class_counts=[0, 0])
    assert find_warnings(measure(), {"train": nobody, "valid": nobody, "test": some}) == []
    (warning,) = find_warnings(measure(), {"train": some, "valid": nobody, "test": some})
    assert warning.startswith("split valid has no positive label")


def test_samples_without_events_are_said() -> None:
    counts = SampleCounts(num_samples=5, num_patients=5, num_labelled=4, num_without_events=3)
    (warning,) = find_warnings(measure(), {"train": counts})
    assert warning == "3 samples have no event before their prediction time"


def test_scales_that_are_apart_are_one_warning() -> None:
    scales = [Scale("a", f"v{n}", 0.9, 1.0, 1.1) for n in range(7)] + [
        Scale("b", f"v{n}", 18 + n, 20 + n, 22 + n) for n in range(7)
    ]
    (warning,) = find_warnings(measure(), {}, scales)
    assert warning.startswith("medians of files or sites a factor apart: 'v6' (26 times as high in b as in a), 'v5' (2")
    assert "and 2 more; where units differ, convert them" in warning
    assert find_warnings(measure(), {}, scales[:7]) == []
    (of_one,) = find_warnings(measure(), {}, [Scale("a", "v", 0.9, 1, 1.1), Scale("a", "v", 8, 9, 10)])
    assert "(9 times as high in a part of a as in another)" in of_one


def test_only_some_are_named() -> None:
    assert name_some(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"
