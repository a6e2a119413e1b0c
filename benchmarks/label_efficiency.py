"""Quality against the number of labelled patients: the model beside the stack of summaries.

    python -m benchmarks.label_efficiency DATA --work DIR [--labelled 64 256 1024 0] [--seeds 0] [-- TRAIN FLAGS]

``DATA`` is a prepared data set with a binary task ``default``.  Of its training patients as many keep their labels, in
the proportion of the classes, those of a smaller number among those of a larger one (0 = all); the others have none,
and teach the VAE.  The stack learns from the labelled ones alone.  Both are tried on the same test patients; which
epoch of the model is best is decided by the labels of the validation split.  The work folder keeps what is done.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from benchmarks.crossfit import METRICS, compare
from benchmarks.machine import describe, publish, split_flags
from benchmarks.stack import summarize
from benchmarks.study import python
from training.teacher import fit_stack

Rows = npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labelled", type=int, nargs="+", default=[64, 256, 1024, 0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the choice of patients and of training")
    parser.add_argument("--output", type=Path)
    arguments, flags = split_flags(sys.argv[1:])
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    copy = link_data(options.data, options.work / "data")
    stays = summarize(options.data)
    table = pq.read_table(copy / "tasks" / "default.parquet", columns=["patient_id", "split", "label"])
    given = {patient: (split, label) for patient, split, label in zip(*table.to_pydict().values(), strict=True)}
    split = np.array([given[patient][0] for patient in stays.patient_id])
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    rows: dict[str, Any] = {}
    for number, seed in itertools.product(options.labelled, options.seeds):
        chosen = train[choose_labelled(stays.label[train], number, seed)]
        kept = {stays.patient_id[row] for row in chosen}
        labels = [label if of != "train" or name in kept else None for name, (of, label) in given.items()]
        task = f"labelled_{number}_{seed}"
        path = options.work / f"{task}.csv"
        pa_csv.write_csv(pa.table({"patient_id": list(given), "label": pa.array(labels, pa.float64())}), path)
        if not (copy / "tasks" / f"{task}.json").exists():
            add = ["add", copy, "--name", task, "--labels", path, "--label_kind", "binary"]
            python("-m", "pipeline.tasks", *add)
        run = options.work / f"run_{task}"
        if not (run / "summary.json").exists():
            wanted = ["--task", task, "--seed", seed, "--resume", *flags]
            python("train.py", "--data_dir", copy, "--output_dir", run, *wanted)
        found = pq.read_table(run / "predictions_test.parquet", columns=["patient_id", "probability"])
        of_patient = dict(zip(*found.to_pydict().values(), strict=True))
        model = np.array([of_patient[stays.patient_id[row]] for row in test])
        stack = fit_stack(stays.features[chosen], stays.label[chosen], stays.features[test], seeds=(0,))["stack"]
        compared = compare(stays.label[test], {"SeqSetVAE": model[None], "stack": stack[None]}, bar="stack")
        rows[task] = {"labelled": len(chosen), "positive": int(stays.label[chosen].sum()), "seed": seed, **compared}
        print(task, {name: [float(of[metric][0]) for metric in METRICS] for name, of in compared["models"].items()})
    publish({**describe(), "test": len(test), "runs": rows}, options.output)


def link_data(data: Path, copy: Path) -> Path:
    """Return a data set with the shards of ``data`` and tasks of its own, so that tasks can be added."""
    if not copy.exists():
        (copy / "tasks").mkdir(parents=True)
        for path in data.iterdir():
            if path.name != "tasks":
                (copy / path.name).symlink_to(path.absolute())
        for path in (data / "tasks").glob("default.*"):
            os.link(path, copy / "tasks" / path.name)
    return copy


def choose_labelled(label: Rows, number: int, seed: int) -> Rows:
    """Return the positions of so many patients (0 = all), as classes occur; smaller choices are nested."""
    if not number or number >= len(label):
        return np.arange(len(label))
    rng = np.random.default_rng(seed)
    place = np.empty(len(label))
    for value in (0, 1):
        own = np.flatnonzero(label == value)
        place[rng.permutation(own)] = (np.arange(len(own)) + 0.5) / len(own)
    return np.sort(np.argsort(place, kind="stable")[:number])


if __name__ == "__main__":
    main()
