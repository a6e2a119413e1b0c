"""The table of ``python -m pipeline.plan DIR``: what each policy of batching would do to a data directory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pipeline.arrays import Floats, Ints
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import SampleIndex
from pipeline.dataset.tasks import load_tasks
from pipeline.options import check_section, option, parse_options
from pipeline.reports.page import read_object
from pipeline.sampling import quality
from pipeline.sampling.cost import CostModel
from pipeline.sampling.plan import plan_epoch
from pipeline.sampling.policy import BUCKET_WIDTH, Policy
from pipeline.schema import SPLITS, UserError
from pipeline.storage.cache import parse_bytes
from pipeline.storage.folder import Folder, as_folder
from pipeline.storage.remote import open_folder

PROG, DESCRIPTION = "python -m pipeline.plan", "Print what each policy of batching would do to a data directory."

CAPTION = """\
Means over {epochs} epochs. Padding: padded cells ÷ all cells, if batches were padded. Pairs: patients of one batch that
share one again in the next epoch. Neighbours: mean numbers of events of a batch and the next. Label and batch: label of
a patient and mean number of events of the batch. Imbalance: difference ÷ mean of the predicted costs of {world_size}
ranks. Peak memory: predicted, without weights and optimiser. A dash stands for a measure without meaning."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan."""

    data_dir: str = option("", "Data directory, or its URL.", metavar="DIR")
    cache_dir: str | None = option(None, "Folder for files of a URL; by default seqsetvae in the user's cache.")
    task: str | None = option(None, "Task whose samples are planned; by default whole patients.")
    split: str = option("train", f"Split to plan: {', '.join(SPLITS)}.")
    batch_size: int = option(16, "Maximum number of patients of a batch, over all ranks.", minimum=1)
    max_events: int | None = option(None, "Also show batches of at most so many events.", minimum=1)
    max_sequence_length: int | None = option(None, "Maximum number of events of a patient.", minimum=1)
    memory_model: str | None = option(None, "Predict peak memory by this memory_model.json of a run.", metavar="FILE")
    max_memory: str | None = option(None, "Also show batches predicted to take at most this memory, e.g. 2GB.")
    bucket_width: float = option(BUCKET_WIDTH, "Reach of bucketing in batches; 0 is plain sorting.", minimum=0)
    world_size: int = option(1, "Number of ranks that share a batch.", minimum=1)
    epochs: int = option(5, "Number of epochs over which measures are averaged.", minimum=2)
    seed: int = option(0, "Random seed of the plans.", minimum=0)

    def __post_init__(self) -> None:
        check_section(self)
        if self.max_memory is not None and self.memory_model is None:
            raise UserError("--max_memory needs --memory_model FILE, the memory_model.json of a run with --max_memory")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The options of the command."""

    plan: PlanOptions


class SplitLengths(NamedTuple):
    """Lengths and labels [N] of the samples of a split, in the order in which the loader numbers them."""

    num_events: Ints
    num_sets: Ints
    label: npt.NDArray[Any]

    @classmethod
    def read(cls, directory: Path | Folder, split: str, task: str | None = None) -> SplitLengths:
        """Read them from the index of a data directory, or from the table of a task; no shard is read."""
        manifest = Manifest.load(directory)
        if split not in manifest.splits:
            raise UserError(f"{directory}: no split {split!r}; it has {', '.join(sorted(manifest.splits))}")
        opened = load_tasks(directory, manifest, task)
        samples = SampleIndex(as_folder(directory), manifest, opened).read(manifest.splits[split])
        return cls(samples.num_events, samples.num_sets, samples.label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 0 when done, 2 for something that the user can mend."""
    try:
        options = parse_options(CommandLine, arguments, prog=PROG, description=DESCRIPTION, positional="data_dir")
        table = make_table(options.plan)
    except UserError as error:
        print(f"pipeline.plan: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 0


def make_table(options: PlanOptions) -> Table:
    """Return the table of measures, a row for each policy."""
    folder = open_folder(options.data_dir, cache_dir=options.cache_dir)
    lengths = SplitLengths.read(folder, options.split, options.task)
    total = lengths.num_events.sum()
    what = "patients" if options.task is None else f"samples of task {options.task}"
    title = f"{options.split} of {options.data_dir}: {len(lengths.label):,} {what}, {total:,} events"
    if options.max_sequence_length is not None:
        num_events = np.minimum(lengths.num_events, options.max_sequence_length)
        num_sets = np.minimum(lengths.num_sets, num_events)  # an upper bound: where sets end is not in the index
        lengths = SplitLengths(num_events, num_sets, lengths.label)
        title += f", of which {num_events.sum():,} are used"
    memory_model = None if options.memory_model is None else _read_memory_model(Path(options.memory_model))
    table = Table("policy", title=title, caption=CAPTION.format(**vars(options)), caption_justify="left")
    for name, policy in _policies(options, memory_model):
        cells = _measure(policy, lengths, options, memory_model)
        if not table.rows:
            for heading in cells:
                table.add_column(heading, justify="right")
        table.add_row(name, *cells.values())
    return table


def _read_memory_model(path: Path) -> CostModel:
    """Return the weights with which a run predicted the peak of a step, in bytes."""
    try:
        return CostModel(**{name: float(weight) for name, weight in read_object(path)["peak"].items()})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"--memory_model {path}: must be the memory_model.json of a run with --max_memory") from None


def _policies(options: PlanOptions, memory_model: CostModel | None) -> Iterator[tuple[str, Policy]]:
    """Yield the name and the settings of each policy that the options ask for."""
    size, width, max_events = options.batch_size, options.bucket_width, options.max_events
    yield f"{size} patients, at random", Policy(batch_size=size, bucketing=False)
    yield f"{size} patients, sorted by events", Policy(batch_size=size, bucket_width=0)
    yield f"{size} patients, bucketed by events", Policy(batch_size=size, bucket_width=width)
    if max_events is not None:
        yield f"{max_events:,} events", Policy(batch_size=None, max_events=max_events, bucket_width=width)
    if options.max_memory is not None and memory_model is not None:
        limit = parse_bytes(options.max_memory)
        yield f"{limit:,} bytes", Policy(batch_size=None, max_cost=limit, budget=memory_model, bucket_width=width)


def _measure(
    policy: Policy, lengths: SplitLengths, options: PlanOptions, memory_model: CostModel | None
) -> dict[str, str]:
    """Return the cells of a policy's row, by heading."""
    events, sets, label = lengths
    cost, ranks = CostModel().predict(events, sets), options.world_size
    plans = [plan_epoch(events, sets, policy, seed=options.seed, epoch=epoch) for epoch in range(options.epochs)]
    sizes = np.concatenate([plan.batch_sizes for plan in plans]) if len(events) else np.zeros(1, np.int64)
    label_correlations = (quality.label_correlation(plan, events, label) for plan in plans)

    def maximum(amount: Ints | Floats) -> float:
        return max(plan.sum_per_batch(amount).max(initial=0) for plan in plans)

    def mean(template: str, measures: Iterable[float]) -> str:
        value = float(np.mean([*measures]))
        return "-" if np.isnan(value) else template.format(value)

    cells = {
        "batches": mean("{:.0f}", (plan.num_batches for plan in plans)),
        "padding\nof events": mean("{:.1%}", (quality.padding_waste(plan, events) for plan in plans)),
        "padding\nof sets": mean("{:.1%}", (quality.padding_waste(plan, sets) for plan in plans)),
        "patients a batch\nmin / median / max": f"{sizes.min()} / {np.median(sizes):g} / {sizes.max()}",
        "max. events\na batch": f"{maximum(events):,}",
        "pairs that\nmeet again": mean("{:.1%}", (quality.pairs_meeting_again(*pair) for pair in pairwise(plans))),
        "correlation of\nneighbours": mean("{:+.2f}", (quality.neighbour_correlation(plan, events) for plan in plans)),
        "correlation of\nlabel and batch": mean("{:+.2f}", label_correlations),
        "imbalance\nof ranks": mean("{:.1%}", (quality.rank_imbalance(plan, cost, ranks) for plan in plans)),
    }
    if memory_model is not None:
        peak = maximum(memory_model.predict(events, sets)) + memory_model.batch
        cells["peak memory\nof a step"] = f"{peak / 2**20:,.0f} MiB"
    return cells
