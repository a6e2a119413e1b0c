"""Measure steps/s, patients/s and peak memory of both presets, by batch size and precision.

A step is that of training: batches come from the loader, events are dropped, the optimiser moves.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.results import PartOptions, Result
from benchmarks.steps import PRECISIONS, Batch, Preset, Stepper, endless_batches, new_model, num_codes

PRESETS: tuple[Preset, ...] = ("small", "reference")
SIZES = (16, 1, 256, 64, 4, 8)
"""The sizes that say most come first, in case the part is cut off."""

MAX_CPU_SIZE, MAX_QUICK_SIZE = 16, 1
"""A step on 256 patients of the reference preset takes some 30 GB, and minutes on a CPU."""

WARM_UP_STEPS, MAX_STEPS = 3, 200


def main() -> None:
    options = PartOptions.parse(__doc__)
    result = Result(options.output, "speed")
    on_gpu = torch.cuda.is_available()
    device, codes = "cuda" if on_gpu else "cpu", num_codes(options.data_dir)
    max_size = MAX_QUICK_SIZE if options.quick else max(SIZES) if on_gpu else MAX_CPU_SIZE
    result.update(device=device, rows=[])
    cells_left = len(PRESETS) * len(PRECISIONS) * sum(size <= max_size for size in SIZES)
    for preset in PRESETS:
        for size, precision in itertools.product(SIZES, PRECISIONS):
            row: dict[str, Any] = {"preset": preset, "precision": precision, "batch_size": size}
            if size > max_size:
                result.append("rows", {**row, "note": "left out: quick" if options.quick else "left out on a CPU"})
                continue
            # Warm-up and loading get the other half of the time that is left.
            seconds = 0.0 if options.quick else min(3.0, options.seconds_left / cells_left / 2)
            stepper = Stepper(new_model(preset, codes), precision, device=device)
            try:
                row |= measure(stepper, endless_batches(options.data_dir, size, device=device), seconds)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            except RuntimeError as error:  # such as a kernel that fails at one size; the other sizes still count
                row["note"] = f"failed: {str(error).splitlines()[0][:200]}"
            del stepper
            free_memory()
            result.append("rows", row)
            cells_left -= 1
    if any(str(row.get("note", "")).startswith("failed") for row in result.content["rows"]):
        raise SystemExit("some sizes failed")


def measure(stepper: Stepper, batches: Iterator[Batch], seconds: float) -> dict[str, float | int | None]:
    """Return the speed of as many steps as take about ``seconds`` together, and the peak memory of the GPU.

    With 0 seconds there is one step to warm up and one that counts.
    """
    on_gpu = stepper.world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step_seconds = 0.0
    for batch in itertools.islice(batches, WARM_UP_STEPS if on_gpu else 1):
        started = time.perf_counter()
        stepper.step(batch)
        wait(on_gpu)
        step_seconds = time.perf_counter() - started  # of the last one: the first take longer than later ones do
    steps = min(max(round(seconds / step_seconds), 3 if seconds else 1), MAX_STEPS)
    patients = events = 0
    started = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        stepper.step(batch)
        patients, events = patients + batch.amounts.num_patients, events + batch.amounts.num_events
    wait(on_gpu)
    elapsed = time.perf_counter() - started
    return {
        "steps": steps,
        "steps_per_second": steps / elapsed,
        "patients_per_second": patients / elapsed,
        "events_per_second": events / elapsed,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
