"""The guide's commands run as they are printed, in both languages, on patient files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import preprocess
import train
from pipeline import plan
from tests.processes import ROOT
from tests.real_shapes import patient_files
from tests.training.runs import short_end
from training import report, trackers

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "python preprocess.py": preprocess.main,
    "python train.py": train.main,
    "python -m pipeline.plan": plan.main,
    "python -m training.report": report.main,
}


def read_commands(page: str, language: str = "bash") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_both_languages_have_the_same_commands() -> None:
    assert read_commands("guide.md") == read_commands("guide.zh-CN.md")


def test_every_command_of_the_guide_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patient_files").mkdir()
    patient_files(tmp_path / "patient_files")
    assert train.main(["--data_dir", "patient_files", "--output_dir", "run"]) == 2
    assert read_commands("guide.zh-CN.md")[0].removesuffix("data") in capsys.readouterr().err
    for line in read_commands("guide.zh-CN.md"):
        (main,) = (main for name, main in COMMANDS.items() if line.startswith(name))
        words = shlex.split(line)
        if "--devices" in words:  # processes of their own take seconds to begin; tests of devices have them
            words[words.index("--devices") + 1] = "1"
        with short_end(report=True):
            assert main(words[3 if words[1] == "-m" else 2 :]) == 0, line
        if "--inspect" in words:
            assert "all is well" in capsys.readouterr().out
    assert {path.stem for path in Path("watched/checkpoints").glob("best_*.pt")}
    assert Path("comparison.html").stat().st_size > 10_000


def test_the_tracker_of_the_docs_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "TRACKERS", dict(trackers.TRACKERS))
    exec("\n".join(read_commands("trackers.md", "python")), {})
    trackers.check_trackers(["printer"])
    (opened,) = trackers.open_trackers(["printer"], tmp_path, {"run": {"seed": 0}}, 0)
    trackers.show_line([opened], "train", {"step": 1, "loss": 2.0})
    opened.close(finished=True)
