"""Every path, module, test and flag that a page names exists."""

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
FOREIGN_FLAGS = {"nthreads", "memory-limit", "cov", "cov-branch"}  # of Dask and pytest


def without_shell(text: str) -> str:
    """Return a page without its shell scripts, which run other programs too."""
    return re.sub(r"```bash\n.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = without_shell(page.read_text(encoding="utf-8"))
    paths = re.findall(rf"(?<![\w./])((?:{ROOMS})/[\w/]+(?:\.\w+)?)(?![\w<-])", text)
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
