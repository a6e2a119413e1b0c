from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import read_metrics, run, write_tiny_data
from tests.training.test_resume import Killed, killed_in
from training import trackers
from training.trackers import Tracker, show_line


class Recorder(Tracker):
    """Records what it is shown; ``package`` is one that is always there."""

    package = "json"
    opened: list[Recorder]

    def __init__(self, directory: Path, identity: str, config: Mapping[str, Any], step: int) -> None:
        self.identity, self.config, self.step, self.lines = (
            identity,
            config,
            step,
            list[tuple[int, Mapping[str, float]]](),
        )
        self.report: Path | None = None
        self.finished: bool | None = None
        Recorder.opened.append(self)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.lines.append((step, numbers))

    def add_report(self, path: Path) -> None:
        self.report = path

    def close(self, *, finished: bool) -> None:
        self.finished = finished


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setitem(trackers.TRACKERS, "recorder", Recorder)
    Recorder.opened = []
    return Recorder.opened


def test_finite_numbers_alone_are_shown() -> None:
    Recorder.opened = []
    recorder = Recorder(Path(), "", {}, 0)
    show_line([recorder], "valid", {"step": 3, "loss": 1, "auroc": None, "kl": math.nan, "tasks": {"a": {"r2": 0.5}}})
    assert recorder.lines == [(3, {"valid/loss": 1.0, "valid/tasks.a.r2": 0.5})]


def test_a_tracker_is_shown_the_lines_of_the_log_and_a_resumed_run_is_the_same_run(
    opened: list[Recorder], tmp_path: Path
) -> None:
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "run"
    flags = ["--track", "recorder", "--checkpoint_steps", "2"]
    with killed_in("train_step", after=7), pytest.raises(Killed):
        run(data, out, *flags)
    assert run(data, out, *flags, "--resume") == 0
    first, second = opened
    assert first.identity == second.identity
    assert len(first.identity) == 32
    assert (first.step, second.step) == (0, 6)
    assert (first.finished, second.finished) == (False, True)
    assert first.config["run.seed"] == 0
    assert (first.report, second.report) == (None, out / "report.html")
    again = {(step, name): x for each in opened for step, numbers in each.lines for name, x in numbers.items()}
    for line in read_metrics(out):
        assert again[line["step"], f"{line['kind']}/seconds"] == line["seconds"]
    assert again[10, "test/auroc"] >= 0


def test_a_tracker_that_is_missing_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers.TensorBoard, "package", "no_such_package")
    for name, advice in (("tensorboard", "pip install 'seqsetvae[tensorboard]'"), ("paper", "choose of tensorboard")):
        assert run(tmp_path / "none", tmp_path / "run", "--track", name) == 2
        assert advice in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
