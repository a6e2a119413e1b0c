"""Seconds of a training step per event, for patients of 100 to 5,000 sets, and what a patient costs.

    python -m benchmarks.growth [--preset small] [--total_sets 15000] [--output FILE.json]

Batches have about equal numbers of sets and of events, so only the length of a patient differs.  The cost of a patient
is fitted as a·events + b·sets + c·sets² + d, none negative, each batch's error relative to its time.  c is that of
attention over sets, forward and backward, timed alone, where noise of the rest cannot hide it; the others are fitted
to what is left of whole steps, for which batches of short patients and of other set sizes are measured too.  Time is
that of the processor on one thread, batches in turns; the least of the rounds counts, for other work on the machine
can only add to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.checkpointing import step
from benchmarks.machine import describe, publish
from benchmarks.synthetic import invented
from model.config import SeqSetVAEConfig
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE

SETS = (100, 300, 1000, 3000, 5000)
OTHERS = ((10, None), (100, 2), (100, 4), (100, 12), (1000, 2), (1000, 12))
"""Further batches for the fit: sets of a patient, events of a set.  None is of sets of one event alone: they have one
inducing row where others have all, which no term can say."""

TERMS = ("event", "set", "set_squared", "patient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("small", "reference"), default="small")
    parser.add_argument("--total_sets", type=int, default=15_000, help="sets of a batch, as far as whole patients go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = [
        invented(max(1, round(options.total_sets / sets)), 0, sets=sets, events=events)
        for sets, events in [*((sets, None) for sets in SETS), *OTHERS]
    ]
    model = SeqSetVAE(SeqSetVAEConfig.preset(options.preset, num_codes=43))
    inputs = [PreparedBatch.build(batch, seed=0) for batch in batches]
    attention = least_seconds([partial(attend, model, given) for given in inputs], options.rounds)
    seconds = least_seconds([partial(step, model, given) for given in inputs], options.rounds)
    # A batch's terms: the sums over its patients.
    terms = np.array(
        [(b.num_events, b.num_sets, int(b.sets_per_patient.square().sum()), b.num_patients) for b in batches],
        dtype=np.float64,
    )
    square = TERMS.index("set_squared")
    of_attention, _ = nnls(terms[:, [1, square]] / attention[:, None], np.ones(len(attention)))
    cost = np.zeros(len(TERMS))
    cost[square] = of_attention[1]
    others = [place for place in range(len(TERMS)) if place != square]
    left = seconds - terms[:, square] * cost[square]
    cost[others], _ = nnls(terms[:, others] / seconds[:, None], left / seconds)
    fitted = terms @ cost
    rows = [
        {
            "patients": batch.num_patients,
            "sets_of_a_patient": batch.num_sets // batch.num_patients,
            "events_of_a_set": round(batch.num_events / batch.num_sets, 2),
            "microseconds_an_event": round(1e6 * taken / batch.num_events, 2),
            "of_which_attention": round(1e6 * term[square] * cost[square] / batch.num_events, 2),
            "fit_error": round(float(fit / taken - 1), 3),
        }
        for batch, taken, term, fit in zip(batches, seconds, terms, fitted, strict=True)
    ]
    rest = [row["microseconds_an_event"] - row["of_which_attention"] for row in rows[: len(SETS)]]
    result = {
        **describe(),
        "preset": options.preset,
        "rounds": options.rounds,
        "growth": rows[: len(SETS)],
        "times_an_event_of_100_sets_at_5000": round(
            rows[len(SETS) - 1]["microseconds_an_event"] / rows[0]["microseconds_an_event"], 3
        ),
        "the_same_without_attention": [round(value / rest[0], 3) for value in rest],
        "for_the_fit": rows[len(SETS) :],
        "nanoseconds": {name: float(f"{1e9 * value:.4g}") for name, value in zip(TERMS, cost, strict=True)},
        "in_events": {name: float(f"{value / cost[0]:.3g}") for name, value in zip(TERMS, cost, strict=True)},
    }
    publish(result, options.output)


def least_seconds(works: list[Callable[[], None]], rounds: int) -> np.ndarray:
    """Of the processor, for each of the works; they take turns, after one to warm up."""
    works[0]()
    least = np.full(len(works), np.inf)
    for _ in range(rounds):
        for place, work in enumerate(works):
            started = time.process_time()
            work()
            least[place] = min(least[place], time.process_time() - started)
    return least


def attend(model: SeqSetVAE, given: PreparedBatch) -> None:
    """Attention over sets alone, of every layer, forward and backward."""
    for layer in model.transformer.layers:
        qkv = torch.randn(given.batch.num_sets, 3 * model.config.width, requires_grad=True)
        layer._attend(qkv, given.sequences).sum().backward()


if __name__ == "__main__":
    main()
