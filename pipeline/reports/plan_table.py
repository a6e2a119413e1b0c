"""What a policy would do to a data set, from its index: measures, and the table of ``python -m pipeline.plan``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import read_index
from pipeline.sampling.cost import CostModel
from pipeline.sampling.plan import plan_epoch
from pipeline.sampling.policy import BUCKET_WIDTH, Policy
from pipeline.sampling.quality import (
    label_correlation,
    neighbour_correlation,
    padding_waste,
    pairs_meeting_again,
    rank_imbalance,
)
from pipeline.schema import SPLITS, UNLABELLED, UserError
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitLengths:
    """What the index says of one split, in the order in which the loader counts patients."""

    num_events: npt.NDArray[np.int64]
    num_sets: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]

    @classmethod
    def read(cls, directory: Path | Folder, split: str) -> SplitLengths:
        """Read the index.

        Raises:
            UserError: the directory, its index or the split cannot be used.
        """
        manifest = Manifest.load(directory)
        if split not in manifest.splits:
            raise UserError(f"{directory}: no split {split!r}; it has {', '.join(sorted(manifest.splits))}")
        index = read_index(directory, manifest)
        index = index.filter(pc.equal(index["split"], split))
        shards = pa.array([entry.path for entry in manifest.splits[split]], pa.string())
        shard = pc.index_in(index["shard"], value_set=shards).to_numpy()
        rows = np.lexsort((index["position"].to_numpy(), shard))
        return cls(
            num_events=index["num_events"].to_numpy().astype(np.int64)[rows],
            num_sets=index["num_sets"].to_numpy().astype(np.int64)[rows],
            label=pc.fill_null(index["label"].cast(pa.int64()), UNLABELLED).to_numpy()[rows],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m pipeline.plan DIR``: print what each policy would do; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.plan", description=__doc__)
    parser.add_argument("data_dir", metavar="DIR", help="what preprocess.py wrote: a folder, or the URL of one")
    parser.add_argument("--cache_dir", help="for files of a URL (default: seqsetvae in the user's cache directory)")
    parser.add_argument("--split", default="train", help=f"one of {', '.join(SPLITS)} (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="most patients a global batch (default: %(default)s)"
    )
    parser.add_argument("--max_events", type=int, help="also show batches of at most so many events")
    parser.add_argument("--max_sequence_length", type=int, help="most events of a patient")
    parser.add_argument("--bucket_width", type=float, default=BUCKET_WIDTH, help="in batches (default: %(default)s)")
    parser.add_argument("--world_size", type=int, default=1, help="ranks that share a batch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs to average over (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    try:
        table = _table(flags)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 0


def _table(flags: argparse.Namespace) -> Table:
    """The table that ``flags`` ask for."""
    if flags.epochs < 2:
        raise UserError(f"--epochs {flags.epochs}: must be at least 2, to compare one with the next")
    if flags.world_size < 1:
        raise UserError(f"--world_size {flags.world_size}: must be at least 1")
    if flags.max_sequence_length is not None and flags.max_sequence_length < 1:
        raise UserError(f"--max_sequence_length {flags.max_sequence_length}: must be at least 1")
    lengths = SplitLengths.read(open_folder(flags.data_dir, cache_dir=flags.cache_dir), flags.split)
    num_events, num_sets = lengths.num_events, lengths.num_sets
    title = f"{flags.split} of {flags.data_dir}: {len(num_events):,} patients, {num_events.sum():,} events"
    if flags.max_sequence_length is not None:
        num_events = np.minimum(num_events, flags.max_sequence_length)
        num_sets = np.minimum(num_sets, num_events)  # an upper bound: where sets end is not in the index
        title += f" ({num_events.sum():,} kept)"

    table = Table(
        title=title,
        caption=f"Means over {flags.epochs} epochs, seed {flags.seed}. r: correlation, - without meaning.",
    )
    table.add_column("policy", no_wrap=True)
    for heading in (
        "batches",
        "padding\nof events",
        "padding\nof sets",
        "patients a batch\nmin / median / max",
        "most events\na batch",
        "pairs\nmeeting again",
        "r of neighbours'\nevents",
        "r of label\nand batch",
        f"imbalance\nof {flags.world_size} ranks",
    ):
        table.add_column(heading, justify="right")
    cost = CostModel().predict(num_events, num_sets)
    for name, policy in _policies(flags):
        plans = [
            plan_epoch(num_events, num_sets, policy, seed=flags.seed, epoch=epoch) for epoch in range(flags.epochs)
        ]
        sizes = np.concatenate([plan.batch_sizes for plan in plans])
        spread = f"{sizes.min()} / {np.median(sizes):g} / {sizes.max()}" if len(sizes) else "-"
        table.add_row(
            name,
            f"{np.mean([plan.num_batches for plan in plans]):.0f}",
            _percent([padding_waste(plan, num_events) for plan in plans]),
            _percent([padding_waste(plan, num_sets) for plan in plans]),
            spread,
            f"{max(plan.sum_per_batch(num_events).max(initial=0) for plan in plans):,}",
            _percent([pairs_meeting_again(plan, later) for plan, later in pairwise(plans)]),
            _signed([neighbour_correlation(plan, num_events) for plan in plans]),
            _signed([label_correlation(plan, num_events, lengths.label) for plan in plans]),
            _percent([rank_imbalance(plan, cost, flags.world_size) for plan in plans]),
        )
    return table


def _policies(flags: argparse.Namespace) -> Iterator[tuple[str, Policy]]:
    width, size, budget = flags.bucket_width, flags.batch_size, flags.max_events
    yield f"{size} patients, at random", Policy(batch_size=size, bucketing=False)
    yield f"{size} patients, sorted by events", Policy(batch_size=size, bucket_width=0)
    yield f"{size} patients, bucketed by events", Policy(batch_size=size, bucket_width=width)
    if budget is not None:
        policy = Policy(batch_size=None, max_events=budget, bucket_width=width)
        yield f"{budget:,} events", policy
        yield f"{budget:,} events and {size} patients", replace(policy, batch_size=size)


def _percent(values: list[float]) -> str:
    return "-" if np.isnan(values).any() else f"{100 * np.mean(values):.1f} %"


def _signed(values: list[float]) -> str:
    return "-" if np.isnan(values).any() else f"{np.mean(values):+.2f}"
