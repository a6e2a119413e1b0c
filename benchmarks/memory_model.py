"""Peak memory of a training step, predicted from what is in its batch.

    python -m benchmarks.memory_model DATA [--preset small] [--output FILE.json]

The peak is fitted by ``a·events + b·sets + c·Σ sets² + d·patients + e``, none below 0, on some batches, and compared
on 20 others: of 1 to 32 patients of the data directory, bucketed and random, and
a few of long made-up histories.  What is fitted is printed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import torch

from benchmarks.checkpointing import step
from benchmarks.machine import describe, publish
from benchmarks.synthetic import invented
from model.config import SeqSetVAEConfig
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import make_loader
from training.memory import count_amounts, fit_peaks, measure_peak

NUM_COMPARED = 20


def batches(data: str, seed: int, num_codes: int) -> list[PatientBatch]:
    found = [
        batch
        for size, bucketing in itertools.product((1, 2, 4, 8, 16), (True, False))
        for batch in itertools.islice(make_loader(data, batch_size=size, bucketing=bucketing, seed=seed), 2)
    ]
    found += [invented(patients, seed, sets=sets) for patients, sets in ((2, 300), (1, 1000), (4, 500))]
    assert all(int(batch.code.max()) < num_codes for batch in found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--preset", choices=("reference", "small"), default="small")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_codes = make_loader(options.data_dir).manifest.num_codes
    model = SeqSetVAE(SeqSetVAEConfig.preset(options.preset, num_codes=num_codes))
    step(model, PreparedBatch.build(invented(1, 0), seed=0))  # makes the gradients

    def measured(of: list[PatientBatch]) -> np.ndarray:
        steps = [functools.partial(step, model, PreparedBatch.build(batch, seed=0)) for batch in of]
        return np.array([measure_peak(one, torch.device("cpu")) for one in steps], dtype=np.float64)

    fitted, compared = batches(options.data_dir, 1, num_codes), batches(options.data_dir, 2, num_codes)
    compared = [compared[at] for at in np.random.default_rng(0).permutation(len(compared))[:NUM_COMPARED]]
    weights = fit_peaks(np.array([count_amounts(batch) for batch in fitted]), measured(fitted))
    predicted, found = np.array([count_amounts(batch) for batch in compared]) @ astuple(weights), measured(compared)
    errors = predicted / found - 1
    result = {
        **describe(),
        "preset": options.preset,
        "bytes": {name: round(weight, 2) for name, weight in asdict(weights).items()},
        "batches_fitted": len(fitted),
        "batches_compared": len(compared),
        "largest_relative_error": round(float(np.abs(errors).max()), 3),
        "median_relative_error": round(float(np.median(np.abs(errors))), 3),
        "mebibytes_of_the_compared": [round(float(peak) / 2**20, 1) for peak in np.sort(found)],
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
