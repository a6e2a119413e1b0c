"""What each choice of the default configuration brings: the same training with one choice undone at a time.

    python -m benchmarks.study RECORDS --format physionet2012 --work DIR [--splits 0 1] [--seeds 0 1 2] [--only NAME …]

Every row but "6 epochs" and the pretrained one trains for the same number of epochs, so as many patients are seen;
mean and standard deviation are over splits by patient and seeds.  ``validation loss`` is the outcome's, at the last
epoch and the least of all epochs.  The test split of the best epoch's weights is read once, and decides nothing.
The work folder keeps what is done: a study that was interrupted goes on, more seeds add to it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from pipeline.machine import usable_cores

ROOT = Path(__file__).parent.parent
DEFAULT = "the default"
PRETRAINED = "pretrained on the same stays, then the default"
VARIANTS: dict[str, list[str]] = {
    DEFAULT: [],
    "random batches": ["--no-bucketing"],
    "no EMA of the weights": ["--ema_decay", "0"],
    "no event dropout": ["--event_dropout", "0"],
    "no VAE losses (supervised)": ["--objective", "supervised"],
    "VAE losses weigh 0.01": ["--vae_weight", "0.01"],
    "product form of events": ["--event_form", "product"],
    "6 epochs": ["--max_epochs", "6"],
    PRETRAINED: ["--init_from"],
}
COLUMNS = {
    "validation_loss_last": "validation loss, last",
    "validation_loss_least": "least",
    "valid_auroc": "validation AUROC",
    "valid_auprc": "AUPRC",
    "test_auroc": "test AUROC",
    "test_auprc": "AUPRC",
    "reconstruction": "reconstruction",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--format", default="physionet2012")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="trainings at a time, of one thread each")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "study.json")
    options = parser.parse_args()
    for split in options.splits:
        prepared(options, split)
    wanted = list(itertools.product(options.only, options.splits, options.seeds))
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda one: run_of(options.work, *one), wanted))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for (name, split, seed), run in zip(wanted, found, strict=True):
        rows[name].append({"split": split, "seed": seed, **figures(run)})
    result = {**describe(), "variants": {name: VARIANTS[name] for name in rows}, "runs": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def prepared(options: argparse.Namespace, split: int) -> Path:
    """The data set of a split by patient, made where it is not there yet."""
    data: Path = options.work / f"split_{split}"
    if not (data / "manifest.json").exists():
        made = [options.records, "--format", options.format, "--output", data, "--split_seed", split]
        python("preprocess.py", *made)
    return data


def run_of(work: Path, name: str, split: int, seed: int) -> Path:
    """The folder of a training run that is done."""
    flags: list[object] = [*VARIANTS[name]]
    if name == PRETRAINED:
        before = work / f"pretrained_{split}_{seed}"
        train(work, before, split, seed, ["--objective", "pretrain"])
        flags.append(before / "checkpoints" / "best.pt")
    folder = "run" if name == DEFAULT else "_".join(name.split())  # benchmarks.quality has the default's
    return train(work, work / f"{folder}_{split}_{seed}", split, seed, flags)


def train(work: Path, run: Path, split: int, seed: int, flags: Sequence[object]) -> Path:
    """``run``, the folder of a training on that split with these flags, made where it is not there yet."""
    if not (run / "summary.json").exists():
        given = ["--data_dir", work / f"split_{split}", "--output_dir", run, "--seed", seed, "--resume"]
        python("train.py", *given, *flags)
        print(run.name, flush=True)
    return run


def python(program: str, *arguments: object) -> None:
    command = [sys.executable, program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def figures(run: Path) -> dict[str, Any]:
    """A run's figures; validation at every epoch is in its log."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["outcome"] for line in lines if line["kind"] == "valid"]
    return {
        "validation_loss_last": losses[-1],
        "validation_loss_least": min(losses),
        "valid_auroc": summary["best"]["auroc"],
        "valid_auprc": summary["best"]["auprc"],
        "test_auroc": summary["test"]["auroc"],
        "test_auprc": summary["test"]["auprc"],
        "reconstruction": summary["test"]["reconstruction"],
        "seconds": summary["seconds"],
    }


def mean_sd(values: list[float]) -> list[float]:
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"| | runs | {' | '.join(COLUMNS.values())} |", "|---|---:|" + "---|" * len(COLUMNS)]
    for name, runs in rows.items():
        cells = []
        for column in COLUMNS:
            mean, sd = mean_sd([run[column] for run in runs])
            cells.append(f"{mean:.3f} ± {sd:.3f}")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
