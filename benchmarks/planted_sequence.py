"""Where the sequence matters: made-up stays whose outcome is the response to a dose, which no summary can see.

    python -m benchmarks.planted_sequence --work DIR [--stays 12000] [--seed 0] [--output FILE.json] [-- TRAIN FLAGS]

A stay has 22 sets, one an hour.  Every set has a blood pressure; some have a temperature or a potassium, which mean
nothing; the first, the last and half of the 20 between have a dose.  In stays of label 1 the pressure is higher in the
set after each of these ten doses and lower in the set after each of the ten sets without one; in stays of label 0 it
is the other way round.

Why summaries cannot see it: exchange, in any stay, the sets between that have a dose with those that have none.  That
turns a stay of one label into an equally probable stay of the other.  No pressure, no other measurement and no time has
changed, nor has the number of doses, or the first or the last of them.  So whatever is computed from each variable by
itself (mean, standard deviation, extremes, first, last, recent mean, count, hours since first and last), and any
function of all of these together, has the same distribution for both labels.  Nor does a set tell by itself: whether it
has a dose agrees with whether the set before had one as often as not.  Only who knows which pressure followed which
set can tell.

SeqSetVAE is trained with the small preset and ``TRAIN_FLAGS``, which flags after ``--`` change, and in the same way
with ``--without contexts``, where the outcome head gets no output of the transformer.  The stack on the summaries of
``benchmarks/stack.py`` is fitted to the stays of train and valid.  Beside them stands what the true probabilities
reach.  Intervals of differences are of the bootstrap over the test stays.  The work folder keeps what is done; other
stays or flags need another one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from benchmarks.crossfit import compare
from benchmarks.machine import describe, publish, split_flags
from benchmarks.stack import summarize
from benchmarks.study import python
from training.teacher import fit_stack

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]

DRAWN_SETS = 20
"""Sets between the first and the last; a multiple of four, so that neighbours agree as often as not."""

SETS = DRAWN_SETS + 2

EFFECT = 1.0
"""How far a dose moves the pressure of the next set, in standard deviations of its noise."""

PRESSURE = 75.0, 10.0
"""Mean of the pressure and standard deviation of its noise, in mmHg."""

OTHERS = {"Temperature": (37.0, 0.7, 0.3), "Potassium": (4.1, 0.5, 0.15)}
"""Mean, standard deviation and share of the sets that have it, of each measurement that means nothing."""

TRAIN_FLAGS = ["--objective", "supervised", "--distill", "0", "--tree_share", "0", "--event_dropout", "0"]
TRAIN_FLAGS += ["--batch_size", "64", "--learning_rate", "4e-4"]
"""Before the model attends to the set before, the outcome's gradient is small beside its noise: it takes large batches
and a low rate to find the effect.  Event dropout would leave doses out, and a teacher that is fitted to summaries has
nothing to teach."""

FULL, WITHOUT = "SeqSetVAE", "SeqSetVAE, --without contexts"
VARIANTS: dict[str, list[str]] = {FULL: [], WITHOUT: ["--without", "contexts"]}
STACK, TRUTH = "stack on summaries", "true probabilities"


class PlantedStays(NamedTuple):
    """N stays of S sets.

    ``minute`` [N, S] int64 and ``dose`` [N, S] are of each set, ``values`` [N, S] of each measurement by its name, NaN
    where the set lacks it; ``label`` [N] int64.
    """

    minute: npt.NDArray[np.int64]
    dose: Booleans
    values: dict[str, Floats]
    label: npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stays", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0, help="of the stays")
    parser.add_argument("--output", type=Path)
    arguments, flags = split_flags(sys.argv[1:])
    options = parser.parse_args(arguments)
    flags = [*TRAIN_FLAGS, *flags]
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    stays = draw_stays(options.stays, options.seed)
    data = _prepare(work, stays)
    predictions: dict[str, Floats] = {}
    for name, own in VARIANTS.items():
        run = work / "_".join(["run", *own])
        if not (run / "summary.json").exists():
            python("train.py", "--data_dir", data, "--output_dir", run, "--resume", *flags, *own)
        predictions[name], test = _read_predictions(run)
    predictions[STACK] = _predict_by_stack(data, test)
    predictions[TRUTH] = true_probability(stays)[test]
    label = stays.label[test]
    found = compare(label, {name: probability[None] for name, probability in predictions.items()}, bar=WITHOUT)
    result = {
        **describe(),
        "stays": options.stays,
        "seed": options.seed,
        "test_stays": len(test),
        "positive": int(label.sum()),
    }
    publish({**result, "effect": EFFECT, "train_flags": flags, **found}, options.output)


def draw_stays(number: int, seed: int) -> PlantedStays:
    """Return ``number`` stays; see the head of this file."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, number)
    dose = draw_doses(number, rng)
    sign = np.where(dose, 1, -1) * np.where(label, 1, -1)[:, None]
    moved = rng.choice([-1, 1], (number, SETS))  # what follows no drawn set is moved by chance, as widely as the rest
    moved[:, 2:] = sign[:, 1:-1]
    mean, std = PRESSURE
    values = {"Pressure": mean + std * (EFFECT * moved + rng.standard_normal((number, SETS)))}
    for name, (mean, std, share) in OTHERS.items():
        value = rng.normal(mean, std, (number, SETS))
        values[name] = np.where(rng.random((number, SETS)) < share, value, np.nan)
    minute = 60 * np.arange(SETS) + rng.integers(0, 40, (number, SETS))
    return PlantedStays(minute, dose, values, label)


def draw_doses(number: int, rng: np.random.Generator) -> Booleans:
    """Return [number, S]: a dose in the first and the last set and in half of the others, so drawn that neighbours
    among these agree as often as they differ: ten times of 19, or nine, either as probable.
    """
    half = np.repeat([False, True], DRAWN_SETS // 2)
    drawn = np.zeros((number, DRAWN_SETS), bool)
    left = np.arange(number)
    while len(left):
        drawn[left] = rng.permuted(np.tile(half, (len(left), 1)), axis=1)
        excess = np.where(drawn[left, 1:] == drawn[left, :-1], 1, -1).sum(1)
        left = left[np.abs(excess) > 1]
    ends = np.ones((number, 1), bool)
    return np.hstack([ends, drawn, ends])


def true_probability(stays: PlantedStays) -> Floats:
    """Return [N], the probability of label 1 given all that a stay holds: no model can do better."""
    mean, std = PRESSURE
    z = (stays.values["Pressure"] - mean) / std
    log_odds = 2 * EFFECT * (z[:, 2:] * np.where(stays.dose[:, 1:-1], 1, -1)).sum(1)
    return 1 / (1 + np.exp(-log_odds))


def events_of(stays: PlantedStays) -> pa.Table:
    """Return the events as a long table; a dose has no value."""
    present = {"Dose": stays.dose} | {name: ~np.isnan(value) for name, value in stays.values.items()}
    tables = []
    for name, there in present.items():
        stay, _ = np.nonzero(there)
        value = stays.values[name][there] if name in stays.values else np.full(len(stay), np.nan)
        columns = {"patient_id": stay, "minute": stays.minute[there], "variable": np.full(len(stay), name)}
        tables.append(pa.table({**columns, "value": pa.array(value, from_pandas=True)}))
    return pa.concat_tables(tables)


def _prepare(work: Path, stays: PlantedStays) -> Path:
    """Return the data set of the stays, made where it is not there yet."""
    data, events, labels = work / "data", work / "events.csv", work / "labels.csv"
    if not (data / "manifest.json").exists():
        pa_csv.write_csv(events_of(stays), events)
        pa_csv.write_csv(pa.table({"patient_id": np.arange(len(stays.label)), "label": stays.label}), labels)
        python("preprocess.py", events, "--format", "table", "--output", data, "--labels", labels)
    return data


def _read_predictions(run: Path) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return the probability of each test stay and its number, in order of the numbers."""
    table = pq.read_table(run / "predictions_test.parquet", columns=["patient_id", "probability"])
    stay = np.array(table["patient_id"].to_pylist(), np.int64)
    order = np.argsort(stay)
    return table["probability"].to_numpy().astype(np.float64)[order], stay[order]


def _predict_by_stack(data: Path, test: npt.NDArray[np.int64]) -> Floats:
    """Return the probability of each test stay by the stack, fitted to all other stays."""
    found = summarize(data)
    stay = np.array(found.patient_id, np.int64)
    order = np.argsort(stay)
    features, label, stay = found.features[order], found.label[order], stay[order]
    tested = np.isin(stay, test)
    assert np.array_equal(stay[tested], test)
    return fit_stack(features[~tested], label[~tested], features[tested])["stack"]


if __name__ == "__main__":
    main()
