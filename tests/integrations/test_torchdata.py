"""``StatefulDataLoader`` of torchdata keeps and restores the place of the loader by its own protocol."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import make_loader
from tests.faults.conftest import cases
from tests.page_code import LAYOUTS, build_script, run_script, stop_after
from tests.pipeline.loading.test_data_loader import POLICIES, twelve_epochs
from tests.training.runs import write_tiny_data

torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


def save_and_load(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=cases(20, 200))
@given(
    policy=st.integers(0, len(POLICIES) - 1),
    prefetch=st.sampled_from([0, 1, 3]),
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_several_runs_hand_out_what_one_does(data_dir: Path, policy: int, prefetch: int, parts: list[int]) -> None:
    """A run asks so many times for a batch, and is resumed: in an epoch, after its last batch, and after its end."""
    handed: list[list[str]] = []
    state: Any = None
    for asked in parts:
        inner = make_loader(data_dir, **POLICIES[policy], prefetch=prefetch)
        batches = torchdata.StatefulDataLoader(inner, batch_size=None)
        if state is not None:
            batches.load_state_dict(state)
        stream = iter(batches)
        for _ in range(asked):
            if (batch := next(stream, None)) is not None:
                handed.append(batch.patient_id)
            else:
                stream = iter(batches)
        state = save_and_load(batches.state_dict())
        assert inner.step == len(handed) or not asked
    assert handed == twelve_epochs(data_dir, policy)[: len(handed)]


@pytest.mark.filterwarnings("ignore:This process")
def test_a_second_iteration_and_workers_are_refused(data_dir: Path) -> None:
    batches = torchdata.StatefulDataLoader(make_loader(data_dir), batch_size=None)
    first, second = iter(batches), iter(batches)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another iteration began"):
        next(first)
    batches = torchdata.StatefulDataLoader(
        make_loader(data_dir), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(RuntimeError, match="give DataLoader num_workers=0"):
        next(iter(batches))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_training_of_the_page_resumes_exactly(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    script = build_script("StatefulDataLoader", layout, **{"batch_size=16": "batch_size=6", "% 100": "% 1"})
    whole = run_script(script, tmp_path)
    assert len(whole["noted"]) == 10
    for stop in (2, 5, 8):
        Path("stateful.pt").unlink()
        with pytest.raises(KeyboardInterrupt):
            run_script(stop_after(script, '"stateful.pt")\n', stop), tmp_path)
        again = run_script(script, tmp_path)
        assert again["noted"] == whole["noted"][stop:]
        for ours, theirs in zip(again["model"].parameters(), whole["model"].parameters(), strict=True):
            assert torch.equal(ours, theirs)
