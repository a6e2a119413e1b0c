"""Every path, module, test and flag that a page names exists, and every page can be found and entered."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

from pipeline.prepare.command import PreprocessOptions
from pipeline.reports.plan_table import CommandLine
from pipeline.tasks import AddCommand
from training import predict
from training.options import TrainOptions

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "README.zh-CN.md"]
ROOMS = "pipeline|model|training|tests|benchmarks|docs"
TESTS: dict[str, str] = {}
for path in ROOT.glob("tests/**/test_*.py"):
    TESTS[path.name] = TESTS.get(path.name, "") + path.read_text(encoding="utf-8")
SECTIONS = [
    kind
    for tree in (TrainOptions, PreprocessOptions, CommandLine, AddCommand, predict.CommandLine)
    for kind in get_type_hints(tree).values()
]
NAMES = {field.name for section in SECTIONS for field in fields(section)} | {"config", "help"}
BENCHMARK_FLAGS = set(re.findall(r'"--(\w+)"', "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))))
FOREIGN_FLAGS = {"nthreads", "memory-limit", "cov", "cov-branch", "logdir"}  # of Dask, pytest and TensorBoard
FOREIGN_FLAGS |= {"nnodes", "nproc-per-node", "node_rank", "max-restarts", "python", "nodes"}  # torchrun and SLURM
FOREIGN_FLAGS |= {"master_addr", "master_port", "rdzv-id", "rdzv-backend", "rdzv-endpoint"}


def without_shell(text: str) -> str:
    """Return a page without its shell scripts, which run other programs too."""
    return re.sub(r"```bash\n.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = without_shell(page.read_text(encoding="utf-8"))
    paths = re.findall(rf"(?<![\w./])((?:{ROOMS})/[\w/]+(?:\.\w+)?(?:-CN\.md)?)(?![\w<-])", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^):#]+)[^)]*\)", text)
    assert [link for link in links if not (link.startswith("http") or (page.parent / link).exists())] == []
    for module, name in re.findall(rf"`(?:python -m )?((?:{ROOMS})(?:\.\w+)*)\.(\w+)", text):
        found = hasattr(import_module(module), name) or list(ROOT.glob(f"{module.replace('.', '/')}/{name}*"))
        assert found or f"{module}.{name}" in {"model.train", "model.eval", "model.safetensors"}, f"{module}.{name}"
    assert [name for name in re.findall(r"test_\w+\.py", text) if name not in TESTS] == []
    named = re.findall(r"(?:(test_\w+\.py)|…)::(test_\w+)", text)
    assert [test for file, test in named if f"def {test}(" not in TESTS.get(file, "".join(TESTS.values()))] == []
    flags = {flag.removeprefix("no-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}
    assert flags - NAMES - BENCHMARK_FLAGS - FOREIGN_FLAGS == set()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them: a second one of a name ends in ``-1``."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names = [
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    ]
    return set(names) | {f"{name}-1" for name in names if names.count(name) > 1}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_a_link_to_a_section_finds_it(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^):#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors((page.parent / target) if target else page), f"{target}#{anchor}"


def test_the_site_has_every_page_and_no_link_out_of_it() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r"^ *- (?:.*: )?([\w.-]+\.md)$", nav, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("docs/*.md"))
    for page in ROOT.glob("docs/*.md"):
        links = re.findall(r"\]\(([^):#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not link.startswith("http") and "/" in link] == [], page.name


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_lists_and_tables_are_read_alike_by_the_site_and_by_others(page: Path) -> None:
    """The site needs an empty line before a list or table, and four spaces before what belongs to an item of a list."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    before = start = ""  # the line before, and the first line of its paragraph
    for line in text.splitlines():
        mark = re.match(r"( *)(- |\d+\. |\|)", line)
        if mark and not before.lstrip().startswith(("- ", "|", "<!--")):  # nor the first of its kind after a paragraph
            assert not before.strip() or before.startswith("  ") or re.match(r"\d+\. ", before), line
        assert not mark or len(mark[1]) % 4 == 0, line
        assert before.strip() or not re.match(r" {1,3}\S", line), line
        is_item = line.startswith("- ") or re.match(r"\d+\. ", line)
        assert not is_item or not re.match(r" {4}(?!- |\|)\S", start), line
        start = start if before.strip() and line.strip() else line
        before = line
