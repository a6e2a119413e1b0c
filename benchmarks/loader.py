"""Patients/s of the loader, beside the ways a user would otherwise read the same patients.

    python -m benchmarks.loader DATA [--split train] [--batch_size 16] [--rounds 5] [--output FILE.json]

All ways give every patient of the split once, shuffled, in batches, as tensors with the same fields: codes, values,
whether there is a value, minutes, set numbers, labels and a padding mask.  The peers draw batches at random:

* ``numpy``: flat arrays in memory, a patient sliced after the other into rectangles of zeros;
* ``pandas``: a Parquet file a patient, read and padded one after the other (a part of the patients is timed).

Ways take turns, and each one's best round counts, so that other work on the machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.machine import describe
from pipeline.loader import PatientLoader, make_loader
from pipeline.plan_report import padding_waste
from pipeline.store import PatientStore

PANDAS_PATIENTS = 256

Batches = Iterator[Any]


def numpy_batches(columns: dict[str, list[np.ndarray]], label: np.ndarray, batch_size: int, seed: int) -> Batches:
    """Slice patient by patient; ``columns`` has an array a patient for each field."""
    order = np.random.default_rng(seed).permutation(len(label))
    fields = list(columns.items())
    sizes = [len(codes) for codes in columns["code"]]
    for first in range(0, len(order), batch_size):
        patients = order[first : first + batch_size].tolist()
        shape = (len(patients), max(sizes[patient] for patient in patients))
        padded = {name: np.zeros(shape, arrays[0].dtype) for name, arrays in fields}
        mask = np.ones(shape, np.bool_)
        for row, patient in enumerate(patients):
            size = sizes[patient]
            mask[row, :size] = False
            for name, arrays in fields:
                padded[name][row, :size] = arrays[patient]
        batch = {name: torch.from_numpy(array) for name, array in padded.items()}
        yield batch | {"padding_mask": torch.from_numpy(mask), "label": torch.from_numpy(label[patients])}


def pandas_batches(directory: Path, num_patients: int, label: np.ndarray, batch_size: int, seed: int) -> Batches:
    """Read and pad a file a patient."""
    order = np.random.default_rng(seed).permutation(num_patients)
    for first in range(0, num_patients, batch_size):
        patients = order[first : first + batch_size]
        frames = [pd.read_parquet(directory / f"{patient}.parquet") for patient in patients]
        longest = max(len(frame) for frame in frames)
        yield {
            name: torch.stack(
                [torch.from_numpy(np.pad(frame[name].to_numpy(), (0, longest - len(frame)))) for frame in frames]
            )
            for name in frames[0].columns
        } | {"label": torch.from_numpy(label[patients])}


def columns_of(store: PatientStore) -> dict[str, list[np.ndarray]]:
    """The split as an array a patient and field, the form that slicing needs."""
    whole = store.windows()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("code", "val", "has_value", "minute", "set_id")}
    for patient in range(store.num_patients):
        padded = store.padded(whole, np.array([patient]))
        for name, arrays in columns.items():
            arrays.append(padded[name].numpy().reshape(-1))
    return columns


def best_rates(ways: dict[str, tuple[int, Callable[[], Batches]]], rounds: int) -> dict[str, float]:
    """Patients/s of each way: (patients it gives, how to begin)."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, (_, begin) in ways.items():
            started = time.perf_counter()
            for _batch in begin():
                pass
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {name: patients / seconds[name] for name, (patients, _) in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # every way on one core

    def ours(prefetch: int = 0) -> PatientLoader:
        return make_loader(options.data_dir, split=options.split, batch_size=options.batch_size, prefetch=prefetch)

    started = time.perf_counter()
    loader = ours()
    start_up = time.perf_counter() - started
    planned, store = loader._load(0, 0, 0)
    windows, plan = planned.windows, planned.plan
    columns, label, count = columns_of(store), store.label, store.num_patients
    some = min(PANDAS_PATIENTS, count)
    ahead = ours(prefetch=2)

    with tempfile.TemporaryDirectory() as folder:
        for patient in range(some):
            frame = pd.DataFrame({name: arrays[patient] for name, arrays in columns.items()})
            frame.to_parquet(Path(folder) / f"{patient}.parquet")
        rates = best_rates(
            {
                "ours, ragged": (count, lambda: iter(loader)),
                "ours, padded": (count, loader.padded),
                "ours, ragged then to_padded": (count, lambda: (batch.to_padded() for batch in loader)),
                "ours, ragged, prefetch 2": (count, lambda: iter(ahead)),
                "ours, padded, prefetch 2": (count, ahead.padded),
                "numpy, sliced": (count, lambda: numpy_batches(columns, label, options.batch_size, 0)),
                "pandas, a file a patient": (
                    some,
                    lambda: pandas_batches(Path(folder), some, label, options.batch_size, 0),
                ),
            },
            options.rounds,
        )

    result = {
        **describe(),
        "data": {"patients": count, "events": int(windows.num_events.sum()), "batch_size": options.batch_size},
        "start_up_seconds": round(start_up, 3),
        "padding_of_events": round(padding_waste(plan, windows.num_events), 4),
        "patients_per_second": {name: round(rate) for name, rate in rates.items()},
        "times_numpy": {name: round(rate / rates["numpy, sliced"], 4) for name, rate in rates.items()},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
