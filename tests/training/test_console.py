"""What a run shows, and what a rank that is not the first keeps to itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from training.console import EpochBar
from training.metrics import Throughput
from training.parallel import World
from training.run_files import memory_file, open_metrics_log

CPU = torch.device("cpu")


def test_the_bar_shows_the_rate_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=160)
    monkeypatch.setattr("training.console.console", terminal)
    throughput = Throughput(num_patients=6, num_events=90, event_cells=100, waited=1.0, seconds=2.0)
    with EpochBar(World(0, 2, CPU), 3) as bar:
        bar.begin(0, 4, 0)
        bar.advance(throughput)
        bar.bar.refresh()
        bar.end(0, {"auroc": None, "auprc": 0.5, "loss": 1.0}, step=None, improved=True)
        bar.begin(1, 4, 0)
    shown = screen.getvalue()
    assert "6.0 patients/s, padding 10.0%" in shown
    assert "epoch 1/3: loss 1.0000, AUROC undefined, AUPRC 0.5000 (best so far)" in shown


def test_of_several_runs_each_line_says_whose_it_is_and_no_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("training.console.console", Console(file=screen, force_terminal=True, color_system=None))
    with EpochBar(World(0, 1, CPU, name="final_0: "), 2) as bar:
        bar.begin(0, 4, 0)
        bar.advance(Throughput(num_patients=6, num_events=90, event_cells=100, waited=1.0, seconds=2.0))
        bar.end(0, {"auroc": None, "auprc": None, "loss": None}, step=None, improved=True)
        bar.end(1, {"auroc": 0.5, "auprc": 0.5, "loss": 1.0}, step=7, improved=False)
    lines = ["final_0: epoch 1/2: done", "final_0: epoch 2/2, step 7: loss 1.0000, AUROC 0.5000, AUPRC 0.5000"]
    assert screen.getvalue().splitlines() == lines


def test_only_the_first_rank_writes_the_log(tmp_path: Path) -> None:
    with open_metrics_log(tmp_path, World(1, 2, CPU), 0) as lines:
        assert lines is None
    assert not list(tmp_path.iterdir())
    assert memory_file(tmp_path, World(1, 2, CPU)).name == "memory_rank1.csv"
    with open_metrics_log(tmp_path, World(0, 2, CPU), 0) as lines:
        assert lines is not None
        lines.write({"kind": "train", "step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1}\n'
