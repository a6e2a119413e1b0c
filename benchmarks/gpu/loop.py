"""Compare the training step on a batch with the usual Python loop over patients and their sets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.results import PartOptions, Result
from benchmarks.gpu.speed import measure, wait
from benchmarks.set_loop import loss_of_loop
from benchmarks.steps import Preset, Stepper, endless_batches, new_model, num_codes

BATCH_SIZE = 16
SECONDS = 3.0


def main() -> None:
    options = PartOptions.parse(__doc__)
    result = Result(options.output, "loop")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, seconds = (2, 0.0) if options.quick else (BATCH_SIZE, SECONDS)
    result.update(device=device, batch_size=size, precision="fp32", rows=[])
    presets: tuple[Preset, ...] = ("small",) if options.quick else ("small", "reference")
    for preset in presets:
        stepper = Stepper(new_model(preset, num_codes(options.data_dir)), device=device)
        batch = measure(stepper, endless_batches(options.data_dir, size, device=device), seconds)
        loop = measure_loop(preset, options.data_dir, device, seconds)
        row: dict[str, Any] = {"preset": preset, "batch_patients_per_second": batch["patients_per_second"], **loop}
        row["times_the_loop"] = row["batch_patients_per_second"] / row["loop_patients_per_second"]
        result.append("rows", row)


def measure_loop(preset: Preset, data_dir: Path, device: str, seconds: float) -> dict[str, float]:
    """Return the rate of training steps on one patient each, set by set, after one step to warm up."""
    stepper = Stepper(new_model(preset, num_codes(data_dir)), device=device)
    batches = endless_batches(data_dir, 1, event_dropout=0.0)
    patients, started = -1, time.perf_counter()
    while patients < 1 or time.perf_counter() - started < seconds:
        stepper.state.optimizer.zero_grad(set_to_none=True)
        loss_of_loop(stepper.model, next(batches).batch, device=device).backward()
        torch.nn.utils.clip_grad_norm_(stepper.model.parameters(), 1.0)
        stepper.state.optimizer.step()
        wait(device == "cuda")
        patients += 1
        if patients == 0:
            started = time.perf_counter()
    return {"loop_patients": patients, "loop_patients_per_second": patients / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()
