"""Speed, memory and padding of training at batch sizes 1 to 32, as a table.

    python -m benchmarks.batch_size_table DATA [--preset reference] [--precision fp32] [--output FILE.json]

Each size trains in a process of its own, ``--rounds`` times in turns, through the loader and the optimiser, on the CPU
or the GPU that there is; the fastest round counts.  Peak memory is all of the process's (RSS) and PyTorch's on the GPU;
padding is that of the padded layout, for batches travel ragged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.speed import wait
from benchmarks.machine import describe
from benchmarks.steps import Stepper, endless_batches, new_model, num_codes, padding_waste_of
from pipeline.machine import peak_rss_bytes

ROOT = Path(__file__).parent.parent
SIZES = (1, 2, 4, 8, 16, 32)
WARM_UP = 3  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--preset", choices=("reference", "small"), default="reference")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--patients", type=int, default=192, help="to train on, at least")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_size(options)))
        return
    rows: dict[int, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for size in SIZES:
            command = [sys.executable, "-m", "benchmarks.batch_size_table", *sys.argv[1:], "--one", str(size)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            row = json.loads(printed.splitlines()[-1])
            if size not in rows or row["patients_per_second"] > rows[size]["patients_per_second"]:
                rows[size] = row
    for row in rows.values():
        row["relative_speed"] = row["patients_per_second"] / rows[1]["patients_per_second"]
    settings = {name: getattr(options, name) for name in ("preset", "precision", "patients", "rounds")}
    result = {**describe(), **settings, "threads": options.threads or torch.get_num_threads(), "sizes": rows}
    print(markdown(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def one_size(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a row of the table in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    stepper = Stepper(new_model(options.preset, num_codes(options.data_dir)), options.precision, device=device)
    batches = endless_batches(options.data_dir, options.one, device=device)
    for batch in itertools.islice(batches, WARM_UP):
        stepper.step(batch)
    wait(on_gpu)
    steps = patients = events = 0
    started = time.perf_counter()
    while patients < options.patients:
        batch = next(batches)
        stepper.step(batch)
        steps, patients, events = steps + 1, patients + batch.amounts.num_patients, events + batch.amounts.num_events
    wait(on_gpu)
    seconds = time.perf_counter() - started
    return {
        "patients_per_second": patients / seconds,
        "events_per_second": events / seconds,
        "milliseconds_a_step": 1e3 * seconds / steps,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "padding_waste": padding_waste_of(options.data_dir, options.one),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table, with what it was measured on above it."""
    about = f"{result['hardware']}, {result['threads']} threads, {result['preset']} preset, {result['precision']}"
    lines = [
        f"{about}, torch {result['torch']}, {result['date']}:",
        "",
        "| batch | relative speed | patients/s | events/s | peak RSS | peak GPU | padding |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, row in result["sizes"].items():
        gpu = "not measured" if row["peak_cuda_bytes"] is None else f"{row['peak_cuda_bytes'] / 1e9:.2f} GB"
        speed = f"{row['relative_speed']:.2f} | {row['patients_per_second']:.1f} | {row['events_per_second']:,.0f}"
        memory = f"{row['peak_rss_bytes'] / 1e9:.2f} GB | {gpu}"
        lines.append(f"| {size} | {speed} | {memory} | {row['padding_waste']:.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
