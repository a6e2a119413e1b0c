"""Patients/s of the loader, beside the ways a user would otherwise read the same patients.

    python -m benchmarks.loader DATA [--batch_size 16] [--rounds 5] [--records RECORDS --peers PYTHON] [--output FILE]

DATA is a data directory, RECORDS the folder of PhysioNet-2012 record files of which it was made, PYTHON that of an
environment with litdata, webdataset and meds-torch-data, which then take part (``benchmarks.peer_loaders``).

All ways give every patient of the split once, shuffled, in batches, as tensors with the same fields: codes, values,
whether there is a value, minutes, set numbers, labels and a padding mask.  The peers draw batches at random:

* ``numpy``: flat arrays in memory, a patient sliced after the other into rectangles of zeros;
* ``pandas``: a Parquet file a patient in the layout of ``patient_files`` (variable, value, minute), read, coded and
  padded one after the other (a part of the patients is timed).

Ways take turns, and each one's best round counts, so that other work on the machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.machine import describe
from benchmarks.preprocess_meds import MTD, write_meds
from pipeline.dataset.tables import read_vocabulary
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader, Transform, make_loader
from pipeline.loading.place import BatchPlace
from pipeline.loading.store import PatientStore, Windows
from pipeline.sampling.quality import padding_waste
from pipeline.storage.ahead import AheadFolder

ROOT = Path(__file__).parents[1]
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


def pandas_batches(directory: Path, code_of: dict[str, int], count: int, batch_size: int, seed: int) -> Batches:
    """Read, code and pad a file a patient."""
    order = np.random.default_rng(seed).permutation(count)
    for first in range(0, count, batch_size):
        columns = [
            patient_of(pd.read_parquet(directory / f"{at}.parquet"), code_of) for at in order[first:][:batch_size]
        ]
        longest = max(len(column["code"]) for column in columns)
        yield {
            name: torch.stack(
                [torch.from_numpy(np.pad(column[name], (0, longest - len(column[name])))) for column in columns]
            )
            for name in columns[0]
        }


def patient_of(events: pd.DataFrame, code_of: dict[str, int]) -> dict[str, np.ndarray]:
    minute = events["minute"].to_numpy(np.float32)
    return {
        "code": events["variable"].map(code_of).to_numpy(np.int64),
        "val": events["value"].fillna(0).to_numpy(np.float32),
        "has_value": events["value"].notna().to_numpy(),
        "minute": minute,
        "set_id": np.cumsum(np.diff(minute, prepend=minute[:1]) != 0),
        "padding_mask": np.zeros(len(events), np.bool_),
    }


def write_pandas(folder: Path, columns: dict[str, list[np.ndarray]], names: list[str], count: int) -> None:
    """The guide's layout, of the patients in memory."""
    for patient in range(count):
        code, value, has_value, minute = (columns[name][patient] for name in ("code", "val", "has_value", "minute"))
        variable = [names[at] for at in code]
        frame = pd.DataFrame({"variable": variable, "value": np.where(has_value, value, np.nan), "minute": minute})
        frame.to_parquet(folder / f"{patient}.parquet")


def peer_rates(
    python: str, records: Path, columns: dict[str, list[np.ndarray]], data: Path, rounds: int, size: int
) -> dict[str, float]:
    """Patients/s of the peers, each in a process of its own."""
    offsets = np.cumsum([0, *map(len, columns["code"])])
    flat = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "arrays.npz", offsets=offsets, **flat)
        (folder / "shards").symlink_to(data / "train", target_is_directory=True)
        write_meds(records, 1, folder / "meds")
        program = Path(python).with_name("MTD_preprocess")
        command = [sys.executable, "-c", MTD, str(program), str(folder / "meds"), str(folder / "cohort")]
        subprocess.run(command, check=True)
        for way in ("litdata", "webdataset", "meds-torch-data"):
            script = [python, str(Path(__file__).with_name("peer_loaders.py")), way, str(folder)]
            script += ["--batch_size", str(size), "--rounds", str(rounds)]
            printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
            rates[way] = json.loads(printed.splitlines()[-1])["patients_per_second"]
    return rates


def columns_of(store: PatientStore, windows: Windows) -> dict[str, list[np.ndarray]]:
    """The split as an array a patient and field, the form that slicing needs."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("code", "val", "has_value", "minute", "set_id")}
    patients = np.arange(store.num_patients + 1)
    for batch in store.gather_batches(windows, patients[:-1], patients):
        padded = batch.to_padded()
        for name, arrays in columns.items():
            arrays.append(padded[name].numpy().reshape(-1))
    return columns


def pad(batch: PatientBatch, place: BatchPlace) -> dict[str, torch.Tensor]:
    return batch.to_padded()


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
    parser.add_argument("--records", type=Path, help="record files of DATA, for --peers")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment that has the peers")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # every way on one core

    def ours(prefetch: int = 0, transform: Transform | None = None) -> PatientLoader:
        flags = {"batch_size": options.batch_size, "prefetch": prefetch}
        return make_loader(options.data_dir, split=options.split, transform=transform, **flags)

    started = time.perf_counter()
    loader = ours()
    start_up = time.perf_counter() - started
    group = loader._load_group(loader._group, AheadFolder(loader._folder, 0))
    windows, plan, store = group.windows, group.plan.batches, group.store
    columns, label, count = columns_of(store, windows), group.plan.samples.label, store.num_patients
    some = min(PANDAS_PATIENTS, count)
    padded, ahead, padded_ahead = ours(transform=pad), ours(prefetch=2), ours(prefetch=2, transform=pad)

    names = read_vocabulary(options.data_dir, loader.manifest)["variable"].to_pylist()
    code_of = {name: code for code, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pandas").mkdir()
        write_pandas(folder / "pandas", columns, names, some)
        ways: dict[str, tuple[int, Callable[[], Batches]]] = {
            "ours, ragged": (count, lambda: iter(loader)),
            "ours, padded": (count, lambda: iter(padded)),
            "ours, ragged, prefetch 2": (count, lambda: iter(ahead)),
            "ours, padded, prefetch 2": (count, lambda: iter(padded_ahead)),
            "numpy, sliced": (count, lambda: numpy_batches(columns, label, options.batch_size, 0)),
            "pandas, a file a patient": (
                some,
                lambda: pandas_batches(folder / "pandas", code_of, some, options.batch_size, 0),
            ),
        }
        if options.peers:
            tars = folder / "tars"
            prepare = ["preprocess.py", str(options.records), "--shard_format", "webdataset", "--output", str(tars)]
            subprocess.run([sys.executable, *prepare], check=True, cwd=ROOT, capture_output=True)
            of_tars = make_loader(tars, batch_size=options.batch_size, prefetch=0, transform=pad)
            ways["ours, padded, from WebDataset"] = (of_tars.num_patients, lambda: iter(of_tars))
        rates = best_rates(ways, options.rounds)
        if options.peers:
            rates |= peer_rates(options.peers, options.records, columns, tars, options.rounds, options.batch_size)

    result = {
        **describe(),
        "data": {"patients": count, "events": int(windows.num_events.sum()), "batch_size": options.batch_size},
        "start_up_seconds": round(start_up, 3),
        "padding_of_events": round(padding_waste(plan, windows.num_events), 4),
        "patients_per_second": {name: round(rate) for name, rate in rates.items()},
        "padded_is_times": {name: round(rates["ours, padded"] / rate, 2) for name, rate in rates.items()},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
