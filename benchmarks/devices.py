"""Training on one process and on several: what a second device brings on this machine.

    python -m benchmarks.devices DATA [--preset small] [--devices 2] [--rounds 3] [--output FILE.json]

On a CPU a "device" is a process with a share of the cores (gloo between them); where there are GPUs it is one of them.
Each way trains an epoch of the same global batches through ``train.py``, in turns; the fastest round counts.  Another
epoch of the several devices is profiled, for the share of a step in which the first waits for gradients of the others.
Weights are the same whatever the number of devices, which the tests hold; this is about speed alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, publish
from pipeline.machine import usable_cores
from training.profiling import COMMUNICATION

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--preset", choices=("reference", "small"), default="small")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--devices", type=int, help="by default all GPUs, or as many as there are cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cores, gpus = usable_cores(), torch.cuda.device_count()
    several = options.devices or gpus or cores
    ways: dict[str, tuple[int, int | None]] = {f"{several} devices": (several, None)}
    if gpus:
        ways = {"1 device": (1, None), **ways}
    else:
        ways = {"1 device, 1 thread": (1, 1), f"1 device, {cores} threads": (1, cores), **ways}
    best = dict.fromkeys(ways, 0.0)
    for _ in range(options.rounds):
        for name, (devices, threads) in ways.items():
            best[name] = max(best[name], float(train(options, devices, threads)["patients_per_second"]))
    profile = train(options, several, None, "--profile")["profile"]
    first = next(iter(best.values()))
    result = {
        **describe(),
        **{name: getattr(options, name) for name in ("preset", "batch_size", "rounds")},
        "patients_per_second": {name: round(value, 2) for name, value in best.items()},
        "times_the_first": {name: round(value / first, 2) for name, value in best.items()},
        "share_of_step_waiting_for_gradients": profile["parts"].get(COMMUNICATION, {}).get("share"),
    }
    publish(result, options.output)


def train(options: argparse.Namespace, devices: int, threads: int | None, *more: str) -> dict[str, Any]:
    """Return the summary of an epoch, whose speed is that of all devices together, without start-up and validation."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data_dir", options.data_dir, "--output_dir", folder, "--max_epochs", "1", "--devices", str(devices)]
        flags += ["--preset", options.preset, "--batch_size", str(options.batch_size), *more]
        flags += [] if threads is None else ["--threads", str(threads)]
        command = [sys.executable, "train.py", "--distill", "0", "--tree_share", "0", *flags]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        return dict(json.loads((Path(folder) / "summary.json").read_text()))


if __name__ == "__main__":
    main()
