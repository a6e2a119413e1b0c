"""What a further prediction time costs, where samples of a patient share the pass of encoder and transformer.

    python -m benchmarks.prefixes DATA [--preset small] [--samples 1 2 8 48] [--hourly TASK] [--output FILE.json]

Sixteen stays of the train split have so many prediction times each, evenly spread over 48 hours.  Measured are
the seconds of the processor, on one thread, for preparing the batch and for a training step of it (forward pass with
reconstruction, outcome loss of all samples, backward pass), all numbers of samples in turns; the least of the rounds
counts.  Up to 8 samples the same is done with separate windows.

With ``--hourly`` the first batches of an epoch are also loaded, prepared and trained on, of whole patients and of the
samples of a task that share windows, in turns: patients a second of the processor.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, publish
from benchmarks.steps import new_model, num_codes
from model.losses import cross_entropy_sum
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import make_loader
from training.data import BatchPreparer, ReadyBatch

HOURS = 48
MAX_SEPARATE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--preset", choices=("reference", "small"), default="small")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 8, 48])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hourly")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = next(iter(make_loader(options.data_dir, split="train", seed=0)))
    model = new_model(options.preset, num_codes(options.data_dir)).train()
    ways: dict[str, Callable[[], PreparedBatch]] = {}
    for number in options.samples:
        prefixes = spread(batch, number)
        ways[f"{number} shared"] = lambda each=prefixes: PreparedBatch.build(batch, prefixes=each, seed=0)
        if number <= MAX_SEPARATE:
            ways[f"{number} separate"] = lambda each=prefixes: PreparedBatch.build(each.separate(batch), seed=0)
    found = {name: {"prepare": float("inf"), "step": float("inf")} for name in ways}
    for _ in range(options.rounds):
        for name, prepare in ways.items():
            seconds, prepared = measure(prepare)
            found[name]["prepare"] = min(found[name]["prepare"], seconds)
            found[name]["step"] = min(found[name]["step"], measure(lambda given=prepared: step(model, given))[0])
    one = found[f"{options.samples[0]} shared"]["step"]
    for name, seconds in found.items():
        more = int(name.split()[0]) - options.samples[0]
        seconds["step_over_first"] = seconds["step"] / one
        seconds["further_sample"] = (seconds["step"] / one - 1) / more if more else 0.0
    result = {**describe(), "preset": options.preset, "patients": batch.num_patients, "ways": found}
    if options.hourly:
        result["patients_a_second"] = compare_rates(options)
    publish(result, options.output)


def compare_rates(options: argparse.Namespace) -> dict[str, float]:
    """Patients a second of training on whole patients and on the samples of a task, the best of the rounds."""
    best = {"default": 0.0, options.hourly: 0.0}
    for _ in range(options.rounds):
        for task, before in best.items():
            model = new_model(options.preset, num_codes(options.data_dir)).train()
            settings: dict[str, Any] = {"seed": 0, "prefetch": 0, "share_windows": True, "batch_size": 16}
            preparer = BatchPreparer(seed=0, event_dropout=0.3)
            batches = iter(make_loader(options.data_dir, task=task, transform=preparer, **settings))
            train_on(model, next(batches))
            start, patients = time.process_time(), 0
            for ready in itertools.islice(batches, options.batches):
                patients += train_on(model, ready)
            best[task] = max(before, patients / (time.process_time() - start))
    return best


def train_on(model: SeqSetVAE, ready: ReadyBatch) -> int:
    """Make a step of a batch and return its patients; a window of a single set is no patient of its own."""
    (part,) = ready.parts
    step(model, part)
    return int((ready.batch.sets_per_patient > 1).sum())


def spread(batch: PatientBatch, number: int) -> Prefixes:
    """So many samples of each patient: the whole one, and those after evenly spread hours."""
    return Prefixes.after_hours(batch, tuple(HOURS * (at + 1) / number for at in range(number - 1)))


def measure(call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of the processor that a call takes, and what it returns."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def step(model: SeqSetVAE, prepared: PreparedBatch) -> None:
    model.zero_grad(set_to_none=True)
    output = model(prepared)
    assert output.logits is not None
    assert output.decoded is not None
    logits = output.logits[0].flatten(0, 1)
    loss = cross_entropy_sum(logits, torch.arange(len(logits)) % 2)
    (loss + (output.decoded - output.events).square().sum() + output.posterior.mu.square().sum()).backward()


if __name__ == "__main__":
    main()
