"""Patients/s of other loaders, in an environment of their own: they pin other versions than this project.

    PEERS_PYTHON benchmarks/peer_loaders.py WAY FOLDER [--batch_size 16] [--rounds 3]

``benchmarks.loader`` writes FOLDER and runs this; it needs PyTorch, NumPy and the peer, and nothing of this project.
Every way gives all patients once a round, shuffled, in padded batches; the best round counts.

* ``litdata``: FOLDER/arrays.npz, optimised to its own chunks first;
* ``webdataset``: FOLDER/shards/*.tar with ``.npy`` members, read, shuffled and collated by plain webdataset;
* ``meds-torch-data``: FOLDER/cohort, as ``MTD_preprocess`` wrote it; its own collation.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIELDS = ("code", "val", "has_value", "minute", "set_id")


def collate(patients: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Patients of arrays to rectangles of zeros, as most collate functions do it."""
    sizes = [len(patient["code"]) for patient in patients]
    mask = np.arange(max(sizes)) >= np.array(sizes)[:, None]
    padded = {}
    for name in FIELDS:
        rectangle = np.zeros(mask.shape, patients[0][name].dtype)
        for row, patient in enumerate(patients):
            rectangle[row, : sizes[row]] = patient[name]
        padded[name] = torch.from_numpy(rectangle)
    return padded | {"padding_mask": torch.from_numpy(mask)}


def litdata(folder: Path, batch_size: int) -> Callable[[], Iterable[Any]]:
    from litdata import StreamingDataLoader, StreamingDataset  # noqa: PLC0415
    from litdata.streaming.writer import BinaryWriter  # noqa: PLC0415

    chunks = folder / "litdata"
    with np.load(folder / "arrays.npz") as arrays:
        columns = {name: arrays[name] for name in (*FIELDS, "offsets")}
    chunks.mkdir()
    writer = BinaryWriter(str(chunks), chunk_bytes="64MB")
    offsets = columns["offsets"].tolist()
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        writer[number] = {name: columns[name][start:stop] for name in FIELDS}
    writer.done()
    writer.merge()

    def begin() -> Iterable[Any]:
        dataset = StreamingDataset(str(chunks), shuffle=True)
        return StreamingDataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=0)

    return begin


def webdataset(folder: Path, batch_size: int) -> Callable[[], Iterable[Any]]:
    import webdataset as wds  # noqa: PLC0415

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))

    def patient(sample: dict[str, Any]) -> dict[str, np.ndarray]:
        sets, events = (np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in ("sets.npy", "events.npy"))
        value = events["value"]
        number = ~np.isnan(value)
        return {
            "code": events["code"].astype(np.int64),
            "val": np.where(number, value, 0),
            "has_value": number,
            "minute": np.repeat(sets["minute"].astype(np.float32), sets["set_size"]),
            "set_id": np.repeat(np.arange(len(sets)), sets["set_size"]),
        }

    def begin() -> Iterable[Any]:
        dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000).map(patient)
        return dataset.batched(batch_size, collation_fn=collate)

    return begin


def meds_torch_data(folder: Path, batch_size: int) -> Callable[[], Iterable[Any]]:
    from meds_torchdata import MEDSPytorchDataset, MEDSTorchDataConfig  # noqa: PLC0415

    config = MEDSTorchDataConfig(
        tensorized_cohort_dir=str(folder / "cohort"),
        max_seq_len=1_000_000,
        seq_sampling_strategy="from_start",
        static_inclusion_mode="omit",  # there are no events without a time
    )
    dataset = MEDSPytorchDataset(config, split="train")

    def begin() -> Iterable[Any]:
        return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, collate_fn=dataset.collate)

    return begin


WAYS = {"litdata": litdata, "webdataset": webdataset, "meds-torch-data": meds_torch_data}


def rows_of(batch: Any) -> int:
    return len(batch["code"] if isinstance(batch, dict) else batch.code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        for path in options.folder.iterdir():
            (own / path.name).symlink_to(path)
        begin = WAYS[options.way](own, options.batch_size)
        rate, patients = 0.0, 0
        for _ in range(options.rounds):
            started = time.perf_counter()
            patients = sum(map(rows_of, begin()))
            rate = max(rate, patients / (time.perf_counter() - started))
    print(json.dumps({"patients": patients, "patients_per_second": rate}))


if __name__ == "__main__":
    main()
