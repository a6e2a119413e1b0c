"""The code of docs/loader.md, by the heading under which it stands, and what runs it and takes notes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.processes import ROOT

PAGE = ROOT / "docs" / "loader.md"
LAYOUTS = {"ragged": 0, "padded": 1}

ACROSS_RANKS = {"batch_size=16": "batch_size=5", "AdamW": "SGD", "lr=1e-3": "lr=1e-3, momentum=0.9"}
"""Changes for a comparison of ranks.  AdamW would make steps of the rounding noise of gradients that are next to 0; of
26 patients the last batch has one, which leaves none for another rank.
"""

NOTES = """
import json, torch.distributed

noted, original = [], compute_loss

def compute_loss(model, batch, counts):
    loss = original(model, batch, counts)
    what = [int(batch["code"].sum())] if isinstance(batch, dict) else batch.batch.patient_id[: batch.num_patients]
    noted.append([what, counts.num_events])
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with open(f"notes.{rank}", "a") as file:
        print(json.dumps(noted[-1]), file=file)
    return loss

torch.manual_seed(0)
"""
"""A wrapper of the page's ``compute_loss``, which notes the patients of each batch, or of tensors alone a sum."""


def read_blocks(heading: str) -> list[str]:
    """Return the Python blocks under a heading of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def build_script(heading: str, layout: str, **changes: str) -> str:
    """Return a training of the page for a layout, which takes notes, with some words of it replaced."""
    (code,) = read_blocks(heading)
    for old, new in changes.items():
        assert old in code, f"docs/loader.md, {heading}: no {old!r}"
        code = code.replace(old, new)
    return read_blocks("What a step takes")[LAYOUTS[layout]] + NOTES + code


def stop_after(script: str, saved: str, step: int) -> str:
    """Return a training that is interrupted after a step, when the last line that ends so has saved it."""
    before, line, after = script.rpartition(saved)
    last = before.rpartition("\n")[2]
    indent = " " * (len(last) - len(last.lstrip()))
    return before + line + f"{indent}if loader.step == {step}:\n{indent}    raise KeyboardInterrupt\n" + after


def run_processes(script: str, folder: Path, *launcher: str) -> None:
    """Run a training in a process of its own, or in those that a launcher starts."""
    (folder / "training.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "training.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def take_notes(folder: Path, ranks: int) -> list[list[Any]]:
    """Return what each rank has noted of its batches, and forget it."""
    paths = [folder / f"notes.{rank}" for rank in range(ranks)]
    notes = [[json.loads(line)[0] for line in path.read_text().splitlines()] for path in paths]
    for path in paths:
        path.unlink()
    return notes


def run_script(script: str, folder: Path) -> dict[str, Any]:
    """Run a training in this process, whose working directory is the folder; return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script, str(folder / "training.py"), "exec"), names)
    return names
