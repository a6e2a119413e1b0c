from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipeline.options import Section, option, parse_explicit_options, parse_options, to_dict
from pipeline.schema import UserError


def parse_pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple((name, value) for name, _, value in (part.partition("=") for part in text.split(",")))
    if not all(value for _, value in pairs):
        raise ValueError(f"{text!r} is not NAME=VALUE,…")
    return pairs


@dataclass(frozen=True, kw_only=True)
class Files(Section):
    """Files."""

    input: Path = option(dataclasses.MISSING, "What is read.", metavar="INPUT")
    output: Path = option(dataclasses.MISSING, "What is written.", metavar="DIR")
    codes: tuple[str, ...] = option(("a", "b"), "Codes that are left out.")
    pairs: tuple[tuple[str, str], ...] = option((("x", "y"),), "Names of splits.", parse=parse_pairs)
    ranges: dict[str, float] = option(dict, "Ranges of variables.", parse=lambda text: {text: 1.0})


@dataclass(frozen=True, kw_only=True)
class Numbers(Section):
    """Numbers."""

    std: float | None = option(None, "Distance of outliers.", above=0)
    count: int = option(1, "Number of things.", minimum=1, maximum=9)
    kind: Literal["x", "y"] = option("x", "Kind of things.")
    fast: bool = option(False, "Whether to hurry.")


@dataclass(frozen=True, kw_only=True)
class Tree:
    files: Files
    numbers: Numbers


def parse(*words: str) -> tuple[Tree, frozenset[str]]:
    return parse_explicit_options(Tree, words, prog="x", description="Test.", positional="input")


def test_what_was_set_is_known_also_where_it_is_the_default() -> None:
    tree, explicit = parse("in", "--output", "out", "--count", "1", "--codes", "c", "d", "--no-fast")
    assert tree.files == Files(input=Path("in"), output=Path("out"), codes=("c", "d"))
    assert tree.numbers == Numbers()
    assert explicit == {"input", "output", "count", "codes", "fast"}
    assert parse_options(Tree, ["in", "--output", "o"], prog="x", description="", positional="input").numbers.count == 1


def test_a_file_gives_what_flags_do_not(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "files: {input: in, output: out, codes: [e], pairs: a=b, ranges: HR}\nnumbers: {count: 3, std: 2}\n"
    )
    tree, explicit = parse("--config", str(tmp_path / "c.yaml"), "--count", "4", "--output", "other")
    assert tree.files == Files(
        input=Path("in"), output=Path("other"), codes=("e",), pairs=(("a", "b"),), ranges={"HR": 1.0}
    )
    assert tree.numbers == Numbers(count=4, std=2)
    assert explicit == {"input", "output", "codes", "pairs", "ranges", "count", "std"}
    assert to_dict(tree)["files"]["pairs"] == [["a", "b"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "o"], "required: INPUT"),
        (["in"], "required: --output"),
        (["in", "--output", "o", "--std", "0"], "--std must be above 0, not 0.0"),
        (["in", "--output", "o", "--std", "inf"], "--std must be above 0"),
        (["in", "--output", "o", "--std", "nan"], "--std must be above 0"),
        (["in", "--output", "o", "--count", "0"], "--count must be from 1 to 9"),
        (["in", "--output", "o", "--count", "10"], "--count must be from 1 to 9"),
        (["in", "--output", "o", "--pairs", "a"], "--pairs: 'a' is not NAME=VALUE"),
        (["in", "--output", "o", "--codes"], "--codes: expected at least one argument"),
        (["in", "--output", "o", "--kind", "z"], "--kind: invalid choice: 'z'"),
        (["in", "--output", "o", "--cou", "1"], "--cou"),
        (["in", "other", "--output", "o"], "unrecognized arguments: other"),
    ],
)
def test_bad_command_lines_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("numbers: {counts: 1}", "there is no option numbers.counts"),
        ("number: {count: 1}", "there is no option number"),
        ("numbers: {count: many}", "--count must be a whole number"),
        ("files: {pairs: a}", "files.pairs: 'a' is not NAME=VALUE"),
        ("files: {codes: [1]}", "--codes must be a list"),
        ("files: {pairs: [[a]]}", "--pairs must be a list"),
        ("[1]", "not a file of options"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("in", "--output", "o", "--config", str(tmp_path / "c.yaml"))


def test_help_is_grouped_and_names_defaults(capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.index("Files:") < text.index("Codes that are left out. Default: a b.") < text.index("Numbers:")
    assert "Names of splits. Default: x=y." in text
    assert "INPUT What is read." in text


@dataclass(frozen=True, kw_only=True)
class Places(Section):
    """Places."""

    place: str | tuple[str, ...] = option("", "A place, or several.")


@dataclass(frozen=True, kw_only=True)
class PlaceTree:
    places: Places


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], ""), (["--place", "a"], "a"), (["--place", "a", "--place", "b", "--place", "a"], ("a", "b", "a"))],
)
def test_a_flag_that_is_given_several_times_is_a_tuple(words: list[str], expected: Any, tmp_path: Path) -> None:
    assert parse_options(PlaceTree, words, prog="x", description="").places.place == expected
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(to_dict(PlaceTree(places=Places(place=expected)))))
    given = ["--config", str(tmp_path / "o.yaml")]
    assert parse_options(PlaceTree, given, prog="x", description="").places.place == expected
    assert parse_options(PlaceTree, [*given, "--place", "c"], prog="x", description="").places.place == "c", "flags win"
