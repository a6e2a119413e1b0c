from __future__ import annotations

import math
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from pipeline.reports.page import MAX_LABEL, draw_figure, figure_label, flatten, format_value, is_finite, read_object
from pipeline.schema import UserError
from tests.pages import image_words

pytestmark = pytest.mark.usefixtures("drawn")

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (-math.inf, "–"),
        (True, "yes"),
        (False, "no"),
        (1_234_567, "1,234,567"),
        (10**400, f"{10**400:,}"),
        (0.0, "0"),
        (0.123456, "0.1235"),
        (12_345.6, "12,346"),
        (1e15, "1e+15"),
        ([], "[]"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_text_of_a_cell(value: object, text: str) -> None:
    assert format_value(value) == text


def test_flatten_by_hand() -> None:
    nested = {"a": {"b": 0.5, "b_low": 0.25, "b_high": 0.75, "c": {"d": None}}, "e": None, "e_low": None, "e_high": 1}
    assert flatten(nested) == {"a b": "0.5 (95 %: 0.25 to 0.75)", "a c d": None, "e": None}
    assert flatten({"x_high": 1, 2: 3}) == {"2": 3}  # YAML has keys that are no text


def test_numbers_that_no_float_holds_are_not_drawn() -> None:
    assert is_finite(3.4e38)
    assert not any(is_finite(value) for value in (math.nan, math.inf, 10**400, -(10**400), None, "1"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "[]"), ("a.json", "{"), ("a.json", "\udcff"), ("a.yaml", "- 1"), ("a.yaml", "a: [")],
)
def test_what_is_no_object_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=name):
        read_object(tmp_path / name)


def test_objects_are_read_and_missing_files_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "a.yaml").write_text("a: {b: 2}")
    assert read_object(tmp_path / "a.json") == {"a": 1}
    assert read_object(tmp_path / "a.yaml") == {"a": {"b": 2}}
    assert read_object(tmp_path / "none.json") == {}


@settings(max_examples=20)
@given(st.text(max_size=60))
def test_a_figure_shows_any_name(name: str) -> None:
    """The name is cut, and what is not ASCII is a question mark; nothing is taken for a formula."""
    shown = name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 3]}..."
    shown = "".join(character if " " <= character <= "~" else "?" for character in shown)

    def draw(axis: Axes) -> None:
        axis.set_xlabel(figure_label(name))
        axis.plot([0, 1], [0, 1], label="a curve")

    address = draw_figure({"Title": draw})
    assert address is not None
    words = image_words(address)
    assert not shown.strip() or shown.strip() in words
    assert {"Title", "a curve"} <= set(words)


def test_no_panels_are_no_figure() -> None:
    assert draw_figure({}) is None


def test_templates_are_installed_with_their_packages() -> None:
    """Each file of a package that is no module is named by the project file, or an installed package lacks it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("pipeline/reports", "training"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
        assert files
        for path in files:
            patterns = project["package-data"][package.replace("/", ".")]
            assert any(fnmatch(path.relative_to(ROOT / package).as_posix(), pattern) for pattern in patterns), path
