"""accelerate of Hugging Face trains with the loader as it is: one process and two see the same batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.page_code import ACROSS_RANKS, LAYOUTS, build_script, run_processes, run_script, stop_after, take_notes
from tests.training.runs import write_tiny_data

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # what accelerate advises


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_goes_on_as_two_in_the_middle_of_an_epoch(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    write_tiny_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save = 'accelerator.save_state("state")\n'
    script = build_script("accelerate", layout, **ACROSS_RANKS)
    script = f"        {save}".join(script.rsplit(f"    {save}", 1))  # after each step
    try:
        whole = run_script(script, tmp_path)["model"].state_dict()
        shutil.rmtree("state")
        (alone,) = take_notes(tmp_path, 1)
        with pytest.raises(KeyboardInterrupt):
            run_script(stop_after(script, save, 8), tmp_path)
    finally:
        AcceleratorState._reset_state(True)
    assert take_notes(tmp_path, 1) == [alone[:8]]
    keep = "torch.save(accelerator.unwrap_model(model).state_dict(), 'weights.pt')\n"
    run_processes(script + keep, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ranks = list(zip(*take_notes(tmp_path, 2), strict=True))
    assert len(alone) == 12
    if layout == "ragged":
        assert [sorted(first + second) for first, second in ranks] == [sorted(ids) for ids in alone[8:]]
    else:
        assert [[first[0] + second[0]] for first, second in ranks] == alone[8:]
    for name, ours in torch.load("weights.pt", weights_only=True).items():
        assert torch.allclose(ours, whole[name], atol=1e-5), name
