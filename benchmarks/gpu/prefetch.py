"""Compare training with batches made ahead of the step, without, with processes for them, and with CUDA graphs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.results import PartOptions, Result
from benchmarks.gpu.runs import ENDED_WELL, SECONDS_TO_STOP, run_training

COMPARED: list[dict[str, object]] = [{"prefetch": 4}, {"prefetch": 0}]
ON_GPU: list[dict[str, object]] = [
    {"prefetch": 4, "prefetch_workers": 4},
    {"prefetch": 4, "prefetch_workers": 4, "cuda_graphs": True},
]
LINES = 24
"""Lines of ``metrics.jsonl`` that suffice."""


def main() -> None:
    options = PartOptions.parse(__doc__)
    result = Result(options.output, "prefetch")
    on_gpu = torch.cuda.is_available()
    result.update(device="cuda" if on_gpu else "cpu", rows=[])
    flags = {
        "data_dir": options.data_dir,
        "preset": "small",
        "precision": "bf16" if on_gpu else "fp32",
        "batch_size": 64 if on_gpu else 16,
        "max_epochs": 50,
        "distill": 0,
        "tree_share": 0,
        "log_steps": 1 if options.quick else 5,
    }
    compared = COMPARED[-1:] if options.quick else COMPARED + (ON_GPU if on_gpu else [])
    for number, changes in enumerate(compared):
        left = options.seconds_left - SECONDS_TO_STOP
        with tempfile.TemporaryDirectory() as folder:
            run = run_training(
                {**flags, **changes},
                Path(folder) / "run",
                left / (len(compared) - number),
                max_lines=1 if options.quick else LINES,
            )
        result.append("rows", {"prefetch_workers": 0, "cuda_graphs": False, **changes, **run})
    if any(row["exit_code"] not in ENDED_WELL for row in result.content["rows"]):
        raise SystemExit("a run of train.py failed")


if __name__ == "__main__":
    main()
