from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.prepare import names
from pipeline.prepare.scales import (
    Scale,
    compare_scales,
    load_scales,
    measure_scales,
    merge_scales,
    pick_extremes,
    save_scales,
)

CHANCE = np.random.default_rng(3)


def rows(*files: list[tuple[str, str, float | None]]) -> pl.DataFrame:
    """Kept rows: (patient, variable, value) of each file."""
    flat = [(number, *row) for number, file in enumerate(files) for row in file]
    frame = pl.DataFrame(flat, {"file": pl.UInt32, "patient_id": pl.String, "variable": pl.String, "value": pl.Float32},
                         orient="row")  # fmt: skip
    return frame.with_columns(names.encode(frame[name]) for name in ("patient_id", "variable"))


def normal(
    mean: float, number: int = 200, patients: int = 20, variable: str = "x"
) -> list[tuple[str, str, float | None]]:
    values = mean * (1 + 0.1 * CHANCE.standard_normal(number))
    return [(f"p{at % patients}", variable, float(value)) for at, value in enumerate(values)]


def test_quartiles_of_each_site_and_variable() -> None:
    values = [(f"p{at % 10}", "x", float(at)) for at in range(101)] + [("p0", "x", None)]
    (scale,) = measure_scales(rows(values[:50], values[50:], normal(1, number=99, variable="few")), ["a/", "a/", "b"])
    assert (scale.site, scale.variable) == ("a/", "x")
    assert (scale.low, scale.median, scale.high) == pytest.approx((25, 50, 75), abs=1)
    assert measure_scales(rows(normal(1, patients=9)), ["a"]) == []
    assert measure_scales(rows([]), ["a"]) == []


@pytest.mark.parametrize(
    ("mine", "other", "is_apart"),
    [
        (lambda: normal(100), lambda: normal(5.5), True),  # mg/dL of glucose, and mmol/L
        (lambda: normal(-70), lambda: normal(-154), True),
        (lambda: normal(100), lambda: normal(180), False),  # less than a factor of two
        (lambda: normal(100), lambda: normal(-300), False),  # no factor
        (lambda: normal(0), lambda: normal(300), False),
        (lambda: normal(1) + normal(9), lambda: normal(4) + normal(30), False),  # apart, but wide
    ],
)
def test_scales_are_apart_where_medians_and_quartiles_are(
    mine: Callable[[], list[tuple[str, str, float | None]]],
    other: Callable[[], list[tuple[str, str, float | None]]],
    is_apart: bool,
) -> None:
    found = compare_scales(measure_scales(rows(mine(), other()), ["a", "b"]))
    assert [name for name, *_ in found] == ["x"] * is_apart


def test_the_largest_ratio_comes_first_and_names_both_sites() -> None:
    scales = [Scale("a", "t", 36, 37, 38), Scale("b", "t", 97, 98.6, 100), Scale("c", "t", 36, 37, 38),
              Scale("a", "g", 4, 5, 6), Scale("c", "g", 80, 90, 100)]  # fmt: skip
    assert compare_scales(scales) == [("g", 18.0, "c", "a"), ("t", pytest.approx(2.665, abs=1e-3), "b", "a")]


def test_many_rows_are_sampled() -> None:
    many = rows(normal(10, number=70_000, patients=500))
    (scale,) = measure_scales(many, ["a"])
    assert scale.median == pytest.approx(10, rel=0.01)


SCALES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3), st.integers(0, 2)), max_size=12)


@given(SCALES, st.integers(1, 4))
def test_what_is_gathered_says_what_all_scales_say(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, int, int]], size: int
) -> None:
    scales = [
        Scale(f"s{at}", name, median - width, median, median + width) for at, (name, median, width) in enumerate(drawn)
    ]
    folder = tmp_path_factory.mktemp("scales")
    paths = [folder / f"{start}.found" for start in range(0, len(scales), size)]
    for start, path in zip(range(0, len(scales), size), paths, strict=True):
        save_scales(pick_extremes(scales[start : start + size]), path)
    merge_scales(paths, folder / "all")
    assert compare_scales(load_scales(folder / "all")) == compare_scales(scales)
    assert len(load_scales(folder / "all")) <= 2 * len({scale.variable for scale in scales})
