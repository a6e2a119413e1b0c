"""The trainings of docs/loader.md that need no other library run as they stand, and resume exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import make_loader
from tests.page_code import LAYOUTS, PAGE, build_script, read_blocks, run_script, stop_after
from tests.training.runs import write_tiny_data

HEADINGS = ["Plain PyTorch", "DataLoader", "StatefulDataLoader", "Lightning", "accelerate"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_training_has_at_most_twenty_lines() -> None:
    for heading in HEADINGS:
        (code,) = read_blocks(heading)
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 20, heading
    headings = [line.removeprefix("## ") for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    assert [name for name in headings if name in HEADINGS] == HEADINGS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heading", HEADINGS[:2])
def test_a_training_sees_every_batch_of_two_epochs(folder: Path, heading: str, layout: str) -> None:
    names = run_script(build_script(heading, layout), folder)
    loader = make_loader("data", batch_size=16)
    batches = [batch for _ in range(2) for batch in loader]
    what = [[int(batch.code.sum())] if layout == "padded" else batch.patient_id for batch in batches]
    assert names["noted"] == [[each, batch.num_events] for each, batch in zip(what, batches, strict=True)]


@pytest.mark.parametrize(("stop", "layout"), [(2, "padded"), (5, "padded"), (8, "ragged")])
def test_a_training_that_is_stopped_goes_on_as_if_it_was_not(folder: Path, stop: int, layout: str) -> None:
    """Stopped after a step that it saved: in an epoch, at its end and in the next.  An epoch has five batches."""
    script = build_script("Plain PyTorch", layout, **{"batch_size=16": "batch_size=6", "% 100": "% 1"})
    whole = run_script(script, folder)
    Path("plain.pt").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_script(stop_after(script, '"plain.pt")\n', stop), folder)
    again = run_script(script, folder)
    assert again["noted"] == whole["noted"][stop:]
    for ours, theirs in zip(again["model"].parameters(), whole["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
