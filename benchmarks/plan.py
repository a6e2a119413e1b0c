"""What the plan promises: padding, mixing, balance, and the time that it takes.

    python -m benchmarks.plan DATA [--output FILE.json]

DATA is PhysioNet-2012 set A as one split: ``preprocess.py set-a --split_fractions 1,0,0 --output DATA``.  Heavy-tailed
histories (log-normal, 500 to 50,000 events) and a million patients are made up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.machine import describe
from pipeline.arrays import Ints
from pipeline.loading.loader import make_loader
from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.sources.table import Table
from pipeline.prepare.splits import SplitRule
from pipeline.reports.plan_table import SplitLengths
from pipeline.sampling.cost import CostModel
from pipeline.sampling.plan import plan_epoch, split_across_ranks
from pipeline.sampling.policy import Policy
from pipeline.sampling.quality import neighbour_correlation, padding_waste, pairs_meeting_again, rank_imbalance

EPOCHS = 6
RANKS = 4


def measures(num_events: Ints, num_sets: Ints, policy: Policy) -> dict[str, float]:
    """Means over epochs, and for the correlation of neighbours their distance from chance."""
    plans = [plan_epoch(num_events, num_sets, policy, seed=0, epoch=epoch) for epoch in range(EPOCHS)]
    assert all(np.array_equal(np.sort(plan.order), np.arange(len(num_events))) for plan in plans)
    cost = CostModel().predict(num_events, num_sets)
    rng = np.random.default_rng(0)
    chance = []
    for plan in plans:
        means = plan.sum_per_batch(num_events) / plan.batch_sizes
        shuffled = rng.permutation(means)
        chance.append(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1] if np.ptp(means) else np.nan)
    counts = [
        [split_across_ranks(plan, cost, rank=rank, world_size=RANKS).batch_sizes.sum() for rank in range(RANKS)]
        for plan in plans
    ]
    return {
        "padding_of_events": round(float(np.mean([padding_waste(plan, num_events) for plan in plans])), 4),
        "padding_of_sets": round(float(np.mean([padding_waste(plan, num_sets) for plan in plans])), 4),
        "pairs_meeting_again": round(float(np.mean([pairs_meeting_again(*pair) for pair in pairwise(plans)])), 4),
        "correlation_of_neighbours": round(
            float(np.mean([neighbour_correlation(plan, num_events) for plan in plans])), 3
        ),
        "correlation_by_chance": round(float(np.mean(chance)), 3),
        f"cost_imbalance_of_{RANKS}_ranks": round(float(np.mean([rank_imbalance(p, cost, RANKS) for p in plans])), 4),
        f"most_patients_of_a_rank_over_fewest_of_{RANKS}": round(max(max(c) / min(c) for c in counts), 3),
    }


def heavy_tailed(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).lognormal(np.log(5000), 1.0, count).clip(500, 50_000).astype(np.int64)


def budget_used(num_events: Ints, policy: Policy) -> dict[str, float]:
    assert policy.max_events is not None
    plan, later = (plan_epoch(num_events, num_events // 6 + 1, policy, seed=0, epoch=epoch) for epoch in (0, 1))
    return {
        "pairs_meeting_again": round(pairs_meeting_again(plan, later), 4),
        "budget_used": round(float(plan.sum_per_batch(num_events).mean() / policy.max_events), 4),
    }


def seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    given = parser.parse_args()

    of_stays = SplitLengths.read(given.data_dir, "train")
    stays = (of_stays.num_events, of_stays.num_sets)
    result: dict[str, Any] = {**describe(), "stays": len(stays[0])}
    result["16 patients"] = {
        "random": measures(*stays, Policy(bucketing=False)),
        "sorted": measures(*stays, Policy(bucket_width=0)),
        **{f"bucket_width {width:g}": measures(*stays, Policy(bucket_width=width)) for width in (2, 4, 5, 6, 8)},
    }
    same = np.full(4000, 100)  # no length, so no correlation of lengths either
    result["stays of one length, bucketed and random (no difference to be made)"] = [
        {
            name: number
            for name, number in measures(same, same // 6, Policy(bucketing=by)).items()
            if not np.isnan(number)
        }
        for by in (True, False)
    ]
    histories = heavy_tailed(10_000)
    ragged = Policy(batch_size=None, max_events=400_000)
    result["10,000 heavy-tailed histories, 400,000 events a batch"] = {
        "bucketed": budget_used(histories, ragged),
        "free composition": budget_used(histories, replace(ragged, bucketing=False)),
    }
    million = heavy_tailed(1_000_000)
    result["plan_of_1_million_patients_seconds"] = min(
        seconds(lambda: plan_epoch(million, million // 6, Policy(), seed=0, epoch=0)) for _ in range(3)
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = {"patient_id": np.arange(1_000_000), "minute": 0.0, "variable": "v", "value": 1.0}
        pl.DataFrame(rows).write_parquet(Path(folder) / "rows.parquet")
        data = Path(folder) / "data"
        build(
            Table(path=Path(folder) / "rows.parquet"),
            data,
            BuildOptions(split_rule=SplitRule(split_fractions=(1.0, 0.0, 0.0))),
        )
        opened: list[Any] = []
        result["start_up_with_1_million_patients_seconds"] = seconds(
            lambda: opened.append(next(iter(make_loader(data, batch_size=16))))
        )
        loader = make_loader(data, batch_size=16, prefetch=0)
        for _ in zip(range(1000), loader, strict=False):
            pass
        state = loader.state_dict()
        result["state_bytes"] = len(json.dumps(state))
        fresh = make_loader(data, batch_size=16, prefetch=0)
        result["resume_seconds"] = seconds(lambda: fresh.load_state_dict(state))
    text = json.dumps(result, indent=1)
    print(text)
    given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
