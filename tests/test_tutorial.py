"""The tutorial runs as it stands on its page, on fewer patients: every command and every piece of Python, in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import pipeline.plan
import pipeline.tasks
import preprocess
import train
import training.report
from tests.training.runs import short_end

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = {
    "preprocess.py": preprocess.main,
    "train.py": train.main,
    "-m pipeline.plan": pipeline.plan.main,
    "-m pipeline.tasks": pipeline.tasks.main,
    "-m training.report": training.report.main,
}


def steps() -> list[tuple[str, str]]:
    """The (command, Python) of each step of the page; one of them is empty."""
    found: list[tuple[str, str]] = []
    code: list[str] | None = None
    for line in PAGE.splitlines():
        if line == "```python":
            code = []
        elif line == "```" and code is not None:
            found.append(("", "\n".join(code)))
            code = None
        elif code is not None:
            code.append(line)
        elif line.startswith("    "):
            found.append((line.strip(), ""))
    return found


def test_the_tutorial_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    commands = [command for command, _ in steps() if command]
    assert len(commands) >= 9
    assert {name for name in COMMANDS if not any(f"python {name} " in command for command in commands)} == set()
    for command, code in steps():
        command = command.replace("--num_patients 300", "--num_patients 40")
        if code:
            exec(code, names)
            continue
        program, arguments = re.fullmatch(r"python ((?:-m )?\S+) (.*)", command).groups()  # type: ignore[union-attr]
        with short_end(report=True):
            assert COMMANDS[program](shlex.split(arguments)) == 0, (command, capfd.readouterr().err)
    for file in ("run/report.html", "run/comparison.html", "eval/latents_test.html", "data/report.html"):
        assert (tmp_path / "tutorial" / file).exists(), file
    assert names["summary"]["steps"] > 0
    assert 0 < float(names["probability"][0]) < 1
