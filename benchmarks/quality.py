"""Whether the model learns: SeqSetVAE beside trees and logistic regression, on the same splits by patient.

    python -m benchmarks.quality RECORDS --format physionet2012 --work DIR [--splits 5] [--seeds 0] [-- TRAIN FLAGS]

Prepares the records once a split (64 / 16 / 20 %), trains with the default configuration, changed by the flags after
``--``, and evaluates the checkpoint that did best on the validation split, once, on the test split.  The work folder
keeps what is done: a run that was interrupted goes on, more seeds and splits add to it.  Seeds are also averaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.baselines import of_data
from benchmarks.machine import describe, split_flags
from benchmarks.study import mean_sd, prepared, train
from training.quality import rank_predictions

ROOT = Path(__file__).parent.parent
Scores = dict[str, list[float]]  # AUROC, AUPRC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--format", default="physionet2012")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    arguments, flags = split_flags(sys.argv[1:])
    options = parser.parse_args(arguments, argparse.Namespace(flags=flags))
    splits = [one_split(options, number) for number in range(options.splits)]
    names = [name for name in splits[0] if all(name in split for split in splits)]
    result = {
        **describe(),
        "train_flags": options.flags,
        "splits": splits,
        "mean_and_sd": {
            name: [[round(of, 4) for of in mean_sd([split[name][metric] for split in splits])] for metric in (0, 1)]
            for name in names
        },
    }
    text = json.dumps(result, indent=1)
    options.output.write_text(text + "\n")
    print(table(result["mean_and_sd"], len(splits)))


def one_split(options: argparse.Namespace, number: int) -> Scores:
    """Test AUROC and AUPRC of every model on split ``number``."""
    data = prepared(options, number)
    known = options.work / f"baselines_{number}.json"
    if not known.exists():
        known.write_text(json.dumps(of_data(data)))
    scores: Scores = {
        name: [model["auroc"], model["auprc"]]
        for name, model in json.loads(known.read_text()).items()
        if isinstance(model, dict)
    }
    probabilities = []
    for seed in options.seeds:
        run = train(options.work, options.work / f"run_{number}_{seed}", number, seed, options.flags)
        predictions = pq.read_table(run / "predictions_test.parquet")
        label = predictions["label"].fill_null(-1).to_numpy().astype(np.int64)
        probabilities.append(predictions["probability"].to_numpy())
        scores[f"SeqSetVAE, seed {seed}"] = score(label, probabilities[-1])
    if len(probabilities) > 1:
        scores[f"SeqSetVAE, mean of {len(probabilities)} seeds"] = score(label, np.mean(probabilities, axis=0))
    print(number, json.dumps(scores), flush=True)
    return scores


def score(label: np.ndarray, probability: np.ndarray) -> list[float]:
    values = rank_predictions(label, probability).values()
    assert None not in values, "a test split has both outcomes"
    return [float(value) for value in values if value is not None]


def table(means: dict[str, list[list[float]]], splits: int) -> str:
    rows = [f"| test, {splits} splits, mean ± sd | AUROC | AUPRC |", "|---|---|---|"]
    rows += [
        f"| {name} | {a:.3f} ± {a_sd:.3f} | {p:.3f} ± {p_sd:.3f} |" for name, ((a, a_sd), (p, p_sd)) in means.items()
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
