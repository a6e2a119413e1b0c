"""Published figures stand on one page, which is made of the committed results; the READMEs repeat a handful of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.figures import RESULTS, TABLES, make_tables, short
from benchmarks.scale_costs import filled

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
MAX_README_LINES = 150
MAX_README_FIGURES = 12


def test_the_page_is_what_the_script_makes() -> None:
    content = make_tables()
    assert filled(PAGE, content) == PAGE, "run python -m benchmarks.figures --write docs/figures.md"
    assert set(re.findall(r"^<!-- (\w+) -->$", PAGE, flags=re.MULTILINE)) == content.keys() | {"end"}


def test_noted_figures_have_no_file_of_their_own_and_a_place() -> None:
    for row in json.loads((RESULTS / "noted.json").read_text(encoding="utf-8")):
        assert row.keys() == {"table", "what", "figure", "command", "hardware", "date"}
        assert row["table"] in TABLES


def test_the_usual_machine_goes_without_saying() -> None:
    assert short("2 cores, Intel(R) Xeon(R) Processor") == "Xeon"
    assert short("1 cores, AMD EPYC") == "1 cores, EPYC"


@pytest.mark.parametrize(("name", "heading"), [("README.md", "In short"), ("README.zh-CN.md", "简而言之")])
def test_a_readme_is_short_and_its_figures_are_those_of_the_page(name: str, heading: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_README_LINES
    section = text.split(f"\n## {heading}\n")[1].split("\n\nLicence")[0].split("\n\n许可证")[0]
    found = re.findall(r"\d+\.\d+(?: %)?|\d+(?= times)|\d+(?= 倍)", section)
    assert 0 < len(found) <= MAX_README_FIGURES
    for figure in found:
        assert re.search(rf"(?<![\d.]){re.escape(figure.replace(' %', '%'))}(?!\d)", PAGE), figure
    assert "docs/figures.md" in section
    before = text.split(f"\n## {heading}\n")[0]
    assert re.findall(r"AUROC|patients/s|患者/s", before) == []
