"""Models beside one another by pooled out-of-fold predictions of all stays, kept for each stay.

    python -m benchmarks.crossfit RECORDS --work DIR [--folds 5] [--fold_seeds 0 1] [--seeds 0] [--jobs 2]
        [--name NAME] [--only_bar] [--kept FILE.npz] [-- TRAIN FLAGS]

For each seed of folds the stays are cut into folds, stratified by outcome; each fold is predicted by models that saw
none of it.  A fifth of the other folds is the inner split: it decides the epoch of SeqSetVAE.  The bar
(``benchmarks/stack.py``, models of ``training/teacher.py``) is fitted twice: to what SeqSetVAE trains on, and to all
other folds.  Flags after ``--`` change the training; ``--name`` tells such runs from others.  The work folder keeps
what is done: a run that was interrupted goes on, others add to it.  ``--kept`` holds the predictions alone, without
ids, so that another machine goes on with them.

Quality is that of the pooled predictions of a seed of folds, averaged over these seeds.  Models are compared stay by
stay: intervals and z are of the bootstrap over stays, who keep their predictions of all seeds together.
Among them is the mean logit of SeqSetVAE and the bar.  Of each seed of folds there is the calibration.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, train_test_split

from benchmarks.machine import describe, publish, split_flags
from benchmarks.stack import Stays, summarize
from benchmarks.study import python
from pipeline.machine import usable_cores
from training.quality import evaluate_predictions
from training.teacher import fit_stack

Floats = npt.NDArray[np.float64]

INNER_SHARE = 0.2
METRICS = {"log_loss": log_loss, "auroc": roc_auc_score, "auprc": average_precision_score}
NUM_RESAMPLES = 500
BAR, BLEND = "stack, all other folds", "mean logit of both"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold_seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of SeqSetVAE, whose predictions are averaged"
    )
    parser.add_argument("--name", default="SeqSetVAE")
    parser.add_argument("--only_bar", action="store_true", help="train no SeqSetVAE; use what the work folder has")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="trainings at a time, of one thread each")
    parser.add_argument("--kept", type=Path, help="predictions of folds that are done: read before, written after")
    parser.add_argument("--output", type=Path)
    arguments, flags = split_flags(sys.argv[1:])
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    stays = _stays_of(options)
    if options.kept and options.kept.exists():
        unpack_folds(options.kept, options.work / "folds", stays.label, options.folds)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        places = list(itertools.product(options.fold_seeds, range(options.folds)))
        list(pool.map(lambda place: _do_fold(options, flags, stays, *place), places))
    if options.kept:
        pack_folds(options.work / "folds", options.kept)
    predictions = {path.stem: _pool(path, stays, options) for path in sorted((options.work / "folds").glob("*"))}
    predictions = {name: found for name, found in predictions.items() if found is not None}
    if {options.name, BAR} <= predictions.keys():
        predictions[BLEND] = expit(np.mean([logit(predictions[name]) for name in (options.name, BAR)], axis=0))
    result = {**describe(), "folds": options.folds, "fold_seeds": options.fold_seeds, "seeds": options.seeds}
    result |= {"train_flags": flags, "stays": len(stays.label), **compare(stays.label, predictions)}
    result["calibration"] = {name: calibrate(stays.label, found) for name, found in predictions.items()}
    publish(result, options.output)


def _stays_of(options: argparse.Namespace) -> Stays:
    """Return the summaries of all stays, which are made once."""
    data, path = options.work / "all", options.work / "stays.npz"
    if not path.exists():
        if not (data / "manifest.json").exists():
            python("preprocess.py", options.records, "--output", data)
        stays = summarize(data)
        columns = {name: np.array(getattr(stays, name)) for name in Stays._fields}
        np.savez_compressed(path, **columns)
    with np.load(path, allow_pickle=False) as found:
        x, names, label, ids = (found[name] for name in Stays._fields)
    return Stays(x, names.tolist(), label, ids.tolist())


def split_stays(label: npt.NDArray[np.int64], folds: int, fold_seed: int, fold: int) -> dict[str, npt.NDArray[Any]]:
    """Return the positions of the stays in ``test``, the fold, and in ``train`` and ``valid``, the inner split."""
    cut = StratifiedKFold(folds, shuffle=True, random_state=fold_seed).split(label, label)
    others, test = next(itertools.islice(cut, fold, None))
    inner = {"test_size": INNER_SHARE, "random_state": fold_seed, "stratify": label[others]}
    train, valid = train_test_split(others, **inner)
    return {"train": np.sort(train), "valid": np.sort(valid), "test": test}


def _do_fold(options: argparse.Namespace, flags: list[str], stays: Stays, fold_seed: int, fold: int) -> None:
    """Predict a fold by every model, where its predictions are not there yet."""
    splits, place = split_stays(stays.label, options.folds, fold_seed, fold), f"{fold_seed}_{fold}.json"
    folders = {name: options.work / "folds" / name for name in (options.name, BAR, "stack, same stays")}
    for name, others in ((BAR, ("train", "valid")), ("stack, same stays", ("train",))):
        if not (folders[name] / place).exists():
            train = np.concatenate([splits[other] for other in others])
            found = fit_stack(stays.features[train], stays.label[train], stays.features[splits["test"]])
            _keep(folders[name] / place, splits["test"], found["stack"])
            for model in ("boosted trees", "wide linear") if name == BAR else ():
                _keep(options.work / "folds" / f"{model}, all other folds" / place, splits["test"], found[model])
    if options.only_bar or (folders[options.name] / place).exists():
        return
    data, ids = options.work / f"data_{fold_seed}_{fold}", np.array(stays.patient_id)
    if not (data / "manifest.json").exists():
        names = np.concatenate([np.full(len(rows), split) for split, rows in splits.items()])
        rows = np.concatenate(list(splits.values()))
        path = options.work / f"splits_{fold_seed}_{fold}.csv"
        pa_csv.write_csv(pa.table({"patient_id": ids[rows], "split": names}), path)
        python("preprocess.py", options.records, "--output", data, "--splits", path)
    answers = []
    for seed in options.seeds:
        run = options.work / f"run_{options.name.replace(' ', '_')}_{fold_seed}_{fold}_{seed}"
        if not (run / "summary.json").exists():
            python("train.py", "--data_dir", data, "--output_dir", run, "--seed", seed, "--resume", *flags)
        table = pq.read_table(run / "predictions_test.parquet", columns=["patient_id", "probability"])
        of_stay = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
        answers.append([of_stay[name] for name in ids[splits["test"]]])
    _keep(folders[options.name] / place, splits["test"], np.mean(answers, axis=0))
    print(options.name, fold_seed, fold, flush=True)


def _keep(path: Path, stays: npt.NDArray[Any], probability: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"stays": stays.tolist(), "probability": probability.tolist()}))


def pack_folds(folder: Path, path: Path) -> None:
    """Write the predictions of all folds that are done to one file, each in the order of its stays."""
    done = sorted(folder.glob("*/*.json"))
    columns = {f"{one.parent.name}/{one.stem}": json.loads(one.read_text())["probability"] for one in done}
    np.savez_compressed(path, **{name: np.array(column, np.float32) for name, column in columns.items()})


def unpack_folds(path: Path, folder: Path, label: npt.NDArray[np.int64], folds: int) -> None:
    """Put the predictions of :func:`pack_folds` where they are not there yet."""
    with np.load(path, allow_pickle=False) as found:
        for name in found.files:
            place = folder / f"{name}.json"
            fold_seed, fold = map(int, place.stem.split("_"))
            if not place.exists():
                _keep(place, split_stays(label, folds, fold_seed, fold)["test"], found[name].astype(np.float64))


def _pool(folder: Path, stays: Stays, options: argparse.Namespace) -> Floats | None:
    """Return the probabilities [seeds of folds, N] that a model gave; None while a fold is missing."""
    found = np.full((len(options.fold_seeds), len(stays.label)), np.nan)
    for (row, fold_seed), fold in itertools.product(enumerate(options.fold_seeds), range(options.folds)):
        path = folder / f"{fold_seed}_{fold}.json"
        if path.exists():
            content = json.loads(path.read_text())
            found[row, content["stays"]] = content["probability"]
    return None if np.isnan(found).any() else found


def measure(label: npt.NDArray[np.int64], probability: Floats, chosen: npt.NDArray[Any]) -> Floats:
    """Return log-loss, AUROC and AUPRC of some stays, averaged over the rows of ``probability`` [seeds, N]."""
    rows = [[metric(label[chosen], row[chosen]) for metric in METRICS.values()] for row in probability]
    return np.mean(rows, axis=0)


def calibrate(label: npt.NDArray[np.int64], probability: Floats) -> list[dict[str, float]]:
    """Return the slope of calibration and the expected error of each row of ``probability`` [seeds, N]."""
    found = [evaluate_predictions(label, row) for row in probability]
    names = [f"{name}{end}" for name in ("calibration_slope", "ece") for end in ("", "_low", "_high")]
    return [{name: round(each[name], 4) for name in names} for each in found]


def compare(label: npt.NDArray[np.int64], predictions: dict[str, Floats], bar: str = BAR) -> dict[str, Any]:
    """Return the quality of each model, and its differences from the model ``bar`` with 95 % intervals and z."""
    rng, everyone = np.random.default_rng(0), np.arange(len(label))
    draws = [rng.integers(len(label), size=len(label)) for _ in range(NUM_RESAMPLES)]
    drawn = {name: np.array([measure(label, p, draw) for draw in draws]) for name, p in predictions.items()}
    result: dict[str, Any] = {"models": {}, "against_the_bar": {}}
    for name, probability in predictions.items():
        values, std = measure(label, probability, everyone), drawn[name].std(0)
        result["models"][name] = {m: [round(v, 5), round(s, 5)] for m, v, s in zip(METRICS, values, std, strict=True)}
        if name != bar and bar in predictions:
            difference = values - measure(label, predictions[bar], everyone)
            spread = drawn[name] - drawn[bar]
            low, high = np.percentile(spread, [2.5, 97.5], axis=0)
            each = zip(METRICS, difference, low, high, difference / np.maximum(spread.std(0), 1e-12), strict=True)
            result["against_the_bar"][name] = {
                metric: {"difference": round(d, 5), "low": round(a, 5), "high": round(b, 5), "z": round(z, 2)}
                for metric, d, a, b, z in each
            }
    return result


if __name__ == "__main__":
    main()
