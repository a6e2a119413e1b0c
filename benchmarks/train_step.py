"""One training step: patients/s and share of the machine's matrix rate, beside a loop over sets of the same maths.

    python -m benchmarks.train_step [--data_dir DATA] [--preset small] [--output FILE.json]

Without ``--data_dir`` a batch with the set sizes of intensive-care stays is made up (73 sets, of 5.7 events each).
All figures of one run come from the same machine at the same time; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import describe, measure_matrix_rate, publish
from benchmarks.steps import PRECISIONS, Stepper, endless_batches, flops_of, new_model, prepare
from benchmarks.synthetic import invented
from model.losses import LossOptions
from tests.model import reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--preset", choices=("reference", "small"), default="reference")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="steps timed, each on another batch")
    parser.add_argument("--no-loop", dest="loop", action="store_false", help="leave out the loop over sets")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    batches = [prepare(invented(options.batch_size, seed)) for seed in range(options.steps)]
    if options.data_dir:
        stream = endless_batches(options.data_dir, options.batch_size, event_dropout=0.0)
        batches = list(itertools.islice(stream, options.steps))
    codes = max(int(ready.batch.code.max()) for ready in batches) + 1
    steppers = {precision: Stepper(new_model(options.preset, codes), precision) for precision in PRECISIONS}
    rate = measure_matrix_rate(torch.float32)
    patients = sum(ready.amounts.num_patients for ready in batches)
    flops = sum(flops_of(ready.batch, steppers["fp32"].model) for ready in batches)
    result: dict[str, object] = {
        **describe(),
        "preset": options.preset,
        "batch_size": options.batch_size,
        "data": "PhysioNet 2012 set A" if options.data_dir else "invented sizes",
        "float32_matrix_gflops": round(rate / 1e9, 1),
        "gflop_per_patient": round(flops / patients / 1e9, 2),
    }
    for precision, stepper in steppers.items():
        seconds = time_median(lambda step=stepper.step: [step(ready) for ready in batches])
        result[f"{precision}_patients_per_second"] = round(patients / seconds, 2)
        if precision == "fp32":
            result["fp32_share_of_matrix_rate"] = round(flops / seconds / rate, 3)
    if options.loop:
        one, model = batches[0].batch, steppers["fp32"].model.eval()
        started = time.perf_counter()
        model.zero_grad()
        reference.total_loss(model, one, LossOptions(), 0.1).backward()
        loop = one.num_patients / (time.perf_counter() - started)
        result["loop_over_sets_patients_per_second"] = round(loop, 3)
        result["times_the_loop"] = round(float(str(result["fp32_patients_per_second"])) / loop, 1)
    publish(result, options.output)


def time_median(work: Callable[[], object]) -> float:
    """Return the median duration of three runs in seconds, after one to warm up."""
    work()
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return sorted(runs)[1]


if __name__ == "__main__":
    main()
