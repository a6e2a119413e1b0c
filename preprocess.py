"""Prepare event tables for training, once: ``python preprocess.py INPUT --output DATA``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.build import EVENTS_PER_SHARD, BuildOptions, build
from pipeline.report import write_data_report
from pipeline.schema import SPLITS, UserError
from pipeline.sources.auto import FORMATS, open_source
from pipeline.statistics import SplitRule


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend."""
    try:
        given, source_options = _parse(arguments)
        source = open_source(given.input, given.format, source_options)
        if given.output.resolve().is_relative_to(given.input.resolve()):
            raise UserError(f"--output {given.output}: lies in the input; name a folder outside of {given.input}")
        console = Console(stderr=True, highlight=False)
        console.print(f"{given.input}: read as {source.name}")
        options = BuildOptions(
            rule=SplitRule(fractions=given.split_fractions, seed=given.split_seed),
            events_per_shard=given.events_per_shard,
        )
        with StageBars(console) as bars:
            summary = build(
                source, given.output, options, workers=given.workers, overwrite=given.overwrite, progress=bars.show
            )
        report = write_data_report(given.output)
    except (UserError, OSError) as error:
        print(f"preprocess.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("preprocess.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    _print_summary(summary, verbose=given.verbose)
    print(f"{given.output}: ready; {report} shows it")
    return 0


def _print_summary(summary: dict[str, Any], *, verbose: bool) -> None:
    if verbose:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    counts: dict[str, dict[str, int]] = summary["splits"]
    table = Table("", *counts["train"])
    for split, numbers in counts.items():
        table.add_row(split, *(f"{number:,}" for number in numbers.values()))
    Console().print(table)
    rejects = ", ".join(f"{reason} {number:,}" for reason, number in summary["rejects"].items()) or "none"
    print(f"rows {summary['events_in']:,} = written {summary['events_written']:,} + rejected ({rejects})")
    print(f"labels from {summary['labels_from'] or 'nowhere'}; {summary['unlabelled_patients']:,} patients unlabelled")
    print(
        f"{summary['seconds']:.1f} s, {summary['events_per_second'] / 1e6:.2f} M rows/s, "
        f"at most {summary['peak_rss_bytes'] / 2**20:,.0f} MiB in a process"
    )


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, and apart from them those that only some formats know."""
    parser = _Parser(
        prog="preprocess.py",
        description="Event tables to length-sorted shards, with train-only statistics.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="file, folder or pattern; or the word synthetic")
    add("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    add("--format", choices=("auto", *FORMATS), default="auto", help="what INPUT is")
    add(
        "--split_fractions",
        type=_fractions,
        default=(0.64, 0.16, 0.20),
        metavar="F,F,F",
        help=f"of {', '.join(SPLITS)}",
    )
    add("--split_seed", type=int, default=0, help="another seed, another split")
    add("--events_per_shard", type=_positive, default=EVENTS_PER_SHARD, help="events of a partition, over its splits")
    add("--shard_format", choices=("parquet",), default="parquet", help="of the shards")
    add("--workers", type=_positive, default=os.cpu_count(), help="processes")
    add("--overwrite", action="store_true", help="replace a data set in DIR, and nothing else there")
    add("--verbose", action="store_true", help="say more of what was found")

    some = parser.add_argument_group("taken by some formats", argument_default=argparse.SUPPRESS)
    source = some.add_argument
    actions = [
        source("--labels", dest="labels_file", type=Path, metavar="FILE", help="outcomes, CSV or Parquet"),
        source("--label_column", metavar="NAME", help="of the outcome in --labels"),
        source(
            "--embeddings",
            dest="embeddings_file",
            type=Path,
            metavar="FILE",
            help="CSV: Key, and a vector for each variable",
        ),
        source("--patient_column", metavar="NAME", help="table: of the patient"),
        source("--minute_column", metavar="NAME", help="table: of minutes since the patient's time origin"),
        source("--time_column", metavar="NAME", help="table: of dates with time, instead"),
        source(
            "--origin_column", metavar="NAME", help="table: of dates that minutes count from; else from the first event"
        ),
        source("--variable_column", metavar="NAME", help="table: of the variable"),
        source("--value_column", metavar="NAME", help="table: of the value"),
        source("--set_column", metavar="NAME", help="table: of the set's number; else a set is a minute"),
        source("--num_patients", type=_positive, help="synthetic: how many"),
        source("--profile", choices=("icu", "heavy"), help="synthetic: stays of 48 hours, or long histories"),
        source("--seed", type=_natural, help="synthetic: of all random numbers"),
    ]
    given = parser.parse_args(arguments)
    return given, {action.dest: vars(given)[action.dest] for action in actions if action.dest in given}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _fractions(text: str) -> tuple[float, float, float]:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != len(SPLITS) or min(parts) < 0 or parts[0] == 0 or not math.isclose(sum(parts), 1.0):
        raise argparse.ArgumentTypeError(f"{text!r} is not three fractions that sum to 1, the first above 0")
    train, valid, test = parts
    return train, valid, test


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


class StageBars:
    """A progress bar a stage, with its rate."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>6}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, stage: str, *, done: int, total: int, rows: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, rate="")
        task = self._tasks[stage]
        elapsed = self._bars.tasks[task].elapsed
        rate = f"{rows / elapsed / 1e6:.2f} M rows/s" if elapsed else ""
        self._bars.update(task, completed=done, rate=rate)


if __name__ == "__main__":
    sys.exit(main())
