"""Train for a few epochs with ``train.py``, from the shards to the metrics of the test split."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.results import PartOptions, Result
from benchmarks.gpu.runs import ENDED_WELL, SECONDS_TO_STOP, run_training


def main() -> None:
    options = PartOptions.parse(__doc__)
    result = Result(options.output, "training")
    on_gpu = torch.cuda.is_available()
    result.update(device="cuda" if on_gpu else "cpu")
    flags = {
        "data_dir": options.data_dir,
        "preset": "reference" if on_gpu else "small",
        "precision": "bf16" if on_gpu else "fp32",
        "batch_size": 32 if on_gpu else 16,
        "max_epochs": 3 if on_gpu else 1,
        "distill": 0,  # a teacher, and trees, are fitted on the CPU
        "tree_share": 0,
        "log_steps": 1 if options.quick else 10,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = run_training(flags, Path(folder) / "run", options.seconds_left - SECONDS_TO_STOP)
    result.update(**run)
    if run["exit_code"] not in ENDED_WELL:
        raise SystemExit("train.py failed")


if __name__ == "__main__":
    main()
