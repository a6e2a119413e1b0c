"""One training step: patients/s and share of the machine's matrix rate, beside a loop over sets of the same maths.

    python -m benchmarks.train_step [--data_dir DATA] [--preset small] [--output FILE.json]

Without ``--data_dir`` a batch with the set sizes of intensive-care stays is made up (73 sets, of 5.7 events each).
All figures of one run come from the same machine at the same time; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from training.flops import step_flops

from benchmarks.machine import describe, publish
from model.config import SeqSetVAEConfig
from model.losses import LossCounts, LossOptions, compute_losses
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import make_loader
from tests.model import reference
from training.profiling import matrix_rate

# Share of sets that have 1, 2, … 16 events, in PhysioNet 2012 set A.
SET_SIZES = np.array([69, 39, 59, 88, 192, 212, 145, 87, 48, 33, 10, 4, 2, 2, 4, 6]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir")
    parser.add_argument("--preset", choices=("reference", "small"), default="reference")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="steps timed, each on another batch")
    parser.add_argument("--no-loop", dest="loop", action="store_false", help="leave out the loop over sets")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    batches = (
        real_batches(options) if options.data_dir else [invented(options.batch_size, i) for i in range(options.steps)]
    )
    config = SeqSetVAEConfig.preset(options.preset, num_codes=max(int(b.code.max()) for b in batches) + 1)
    model = SeqSetVAE(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    weights = LossOptions()

    def step_of(batch: PatientBatch, number: int, dtype: torch.dtype | None) -> None:
        counts = LossCounts(num_events=batch.num_events, num_sets=batch.num_sets, num_labelled=batch.num_patients)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(PreparedBatch.build(batch, seed=0, step=number))
            compute_losses(output, batch.label, weights, counts, beta=0.1).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    rate = matrix_rate(torch.float32)
    patients = sum(b.num_patients for b in batches)
    flops = sum(sum(step_flops(batch, config).values()) for batch in batches)
    result: dict[str, object] = {
        **describe(),
        "preset": options.preset,
        "batch_size": options.batch_size,
        "data": "PhysioNet 2012 set A" if options.data_dir else "invented sizes",
        "float32_matrix_gflops": round(rate / 1e9, 1),
        "gflop_per_patient": round(flops / patients / 1e9, 2),
    }
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        seconds = timed(lambda dtype=dtype: [step_of(b, n, dtype) for n, b in enumerate(batches)])  # type: ignore[misc]
        result[f"{name}_patients_per_second"] = round(patients / seconds, 2)
        if dtype is None:
            result["fp32_share_of_matrix_rate"] = round(flops / seconds / rate, 3)
    if options.loop:
        one = batches[0]
        started = time.perf_counter()
        model.zero_grad()
        reference.total_loss(model, one, weights, 0.1).backward()
        loop = one.num_patients / (time.perf_counter() - started)
        result["loop_over_sets_patients_per_second"] = round(loop, 3)
        result["times_the_loop"] = round(float(str(result["fp32_patients_per_second"])) / loop, 1)
    publish(result, options.output)


def timed(work: Callable[[], object]) -> float:
    """Seconds of the median of three runs after one to warm up."""
    work()
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return sorted(runs)[1]


def invented(batch_size: int, seed: int, *, sets: int | None = None, events: int | None = None) -> PatientBatch:
    """Patients with as many sets and events a set as intensive-care stays have, or exactly as many as asked for."""
    generator = np.random.default_rng(seed)
    num_sets = generator.integers(66, 81, batch_size) if sets is None else np.full(batch_size, sets)
    sizes = generator.choice(np.arange(1, 17), num_sets.sum(), p=SET_SIZES / SET_SIZES.sum())
    sizes = sizes if events is None else np.full_like(sizes, events)
    num_events = int(sizes.sum())
    zero = np.zeros(1, np.int64)
    return PatientBatch(
        code=torch.from_numpy(generator.integers(2, 43, num_events)),
        value=torch.from_numpy(generator.standard_normal(num_events, np.float32)),
        has_value=torch.ones(num_events, dtype=torch.bool),
        set_offsets=torch.from_numpy(np.concatenate([zero, sizes.cumsum()])),
        minute=torch.from_numpy(generator.uniform(0, 2880, num_sets.sum()).astype(np.float32)),
        patient_offsets=torch.from_numpy(np.concatenate([zero, num_sets.cumsum()])),
        label=torch.from_numpy(generator.integers(0, 2, batch_size)),
        patient_id=[str(number) for number in range(batch_size)],
    )


def real_batches(options: argparse.Namespace) -> list[PatientBatch]:
    loader = make_loader(options.data_dir, split="train", batch_size=options.batch_size, seed=0)
    return [batch for _, batch in zip(range(options.steps), loader, strict=False)]


if __name__ == "__main__":
    main()
