"""Memory and time of a training step with and without gradient checkpointing.

    python -m benchmarks.checkpointing [--data_dir DATA] [--preset reference] [--output FILE.json]

Memory is what PyTorch's CPU allocator was asked for during one step, over what it held before it (weights, optimiser,
gradients, batch): the most at any moment, and what is kept for the backward pass when the loss is known.  Time is that
of the processor on one thread, with and without in turns; the least of the rounds counts, for other work on the machine
can only add to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.machine import describe, publish
from benchmarks.steps import count_batch
from benchmarks.synthetic import invented
from model.config import SeqSetVAEConfig
from model.losses import LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import make_loader

LONG_SETS, LONG_PATIENTS = 1000, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="take a batch of 16 from here; otherwise one of its sizes is made up")
    parser.add_argument("--preset", choices=("reference", "small"), default="reference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stays = next(iter(make_loader(options.data_dir, split="train", seed=0))) if options.data_dir else invented(16, 0)
    batches = {
        "16 stays of PhysioNet 2012 set A" if options.data_dir else "16 stays, invented sizes": stays,
        f"{LONG_PATIENTS} patients of {LONG_SETS} sets": invented(LONG_PATIENTS, 0, sets=LONG_SETS),
    }
    result: dict[str, object] = {**describe(), "preset": options.preset, "rounds": options.rounds}
    for name, batch in batches.items():
        result[name] = compare(batch, options.preset, options.rounds)
    publish(result, options.output)


def compare(batch: PatientBatch, preset: str, rounds: int) -> dict[str, object]:
    """Figures of both ways on one batch, and checkpointing's as shares of those without."""
    model = SeqSetVAE(SeqSetVAEConfig.preset(preset, num_codes=int(batch.code.max()) + 1))
    given, ways = PreparedBatch.build(batch, seed=0), {"kept": False, "checkpointed": True}
    memory, seconds = {}, {name: [] for name in ways}
    for name, checkpointed in ways.items():
        model.gradient_checkpointing = checkpointed
        step(model, given)  # makes the gradients
        memory[name] = memory_of(model, given)
    for _ in range(rounds):
        for name, checkpointed in ways.items():
            model.gradient_checkpointing = checkpointed
            started = time.process_time()
            step(model, given)
            seconds[name].append(time.process_time() - started)
    least = {name: min(runs) for name, runs in seconds.items()}
    return {
        "sets": batch.num_sets,
        "events": batch.num_events,
        "peak_mebibytes": {name: round(peak / 2**20, 1) for name, (peak, _) in memory.items()},
        "mebibytes_kept_for_backward": {name: round(kept / 2**20, 1) for name, (_, kept) in memory.items()},
        "processor_seconds": {name: round(value, 3) for name, value in least.items()},
        "share_of_peak": round(memory["checkpointed"][0] / memory["kept"][0], 3),
        "more_time": round(least["checkpointed"] / least["kept"] - 1, 3),
    }


def step(model: SeqSetVAE, given: PreparedBatch) -> None:
    """Forward and backward pass with noise; gradients add up in place."""
    batch = given.batch
    with record_function("forward"):
        total = compute_losses(model(given), batch.label, LossOptions(), count_batch(batch), beta=0.1).total
    total.backward()


def memory_of(model: SeqSetVAE, given: PreparedBatch) -> tuple[int, int]:
    """(most bytes at any moment of a step, bytes held after its forward pass), over those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(model, given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    (forward,) = [event for event in events if event["name"] == "forward"]
    held = peak = kept = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
        if event["ts"] <= forward["ts"] + forward["dur"]:
            kept = held
    return peak, kept


if __name__ == "__main__":
    main()
