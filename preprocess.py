"""Prepare event tables for training, once: ``python preprocess.py INPUT --output DATA``."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.dataset.schemas import SHARD_SUFFIXES
from pipeline.prepare.build import EVENTS_PER_SHARD, BuildOptions, build
from pipeline.prepare.executors import LOCAL
from pipeline.prepare.like import Like, all_in
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.rules import ACTIONS, AGGREGATES, Rules
from pipeline.prepare.sources.auto import FORMATS, open_source
from pipeline.prepare.sources.meds import EXCLUDE_CODES
from pipeline.prepare.sources.side_files import read_ranges
from pipeline.prepare.splits import SplitRule
from pipeline.reports.data_report import write_data_report
from pipeline.schema import PRIVATE_UMASK, REPORT_FILE, SPLITS, UserError
from pipeline.storage.files import remove_leftovers

DISK_FULL: Final = "{}: no space left on the disk; free some, and the same command goes on from here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend.  Files that it makes are their owner's alone."""
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        given, flags = _parse(arguments)
        source = open_source(given.input, given.format, flags.source)
        if given.output.resolve().is_relative_to(given.input.resolve()):
            raise UserError(f"--output {given.output}: lies in the input; name a folder outside of {given.input}")
        console = Console(stderr=True, highlight=False)
        console.print(f"{given.input}: read as {source.name}")
        shape = {"events_per_shard": given.events_per_shard, "shard_format": given.shard_format}
        shape |= {"pseudonyms": given.pseudonymize and Pseudonyms.read(given.pseudonymize)}
        if given.like is None:
            options = BuildOptions(rule=SplitRule(**flags.split), rules=Rules(**flags.rules), **shape)
        else:
            like = Like.open(given.like)
            if like.manifest.options.get("pseudonym_key") and not given.pseudonymize:
                raise UserError(f"--like {given.like}: has pseudonyms for patients; give --pseudonymize too")
            source = like.source(source, flags.source)
            options = BuildOptions(rule=all_in(given.like_split), rules=like.rules(flags.rules), like=like, **shape)
        with StageBars(console) as bars:
            summary = build(
                source,
                given.output,
                options,
                executor=given.executor,
                workers=given.workers,
                overwrite=given.overwrite,
                progress=bars.show,
                say=lambda line: console.print(f"{given.output}: {line}", soft_wrap=True),
            )
        report = given.output / REPORT_FILE
        if not report.exists():
            remove_leftovers(given.output, REPORT_FILE)
            write_data_report(given.output)
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"preprocess.py: {DISK_FULL.format(given.output) if full else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("preprocess.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    _print_summary(summary, verbose=given.verbose)
    print(f"{given.output}: ready; {report} shows it")
    return 0


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(number)


def _print_summary(summary: dict[str, Any], *, verbose: bool) -> None:
    if verbose:
        shown = {name: value for name, value in summary.items() if name != "patients_without_events_first"}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
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


class _Flags(NamedTuple):
    """Those of the flags that were given, by the field that they set: of a source, of ``Rules``, of ``SplitRule``."""

    source: dict[str, Any]
    rules: dict[str, Any]
    split: dict[str, Any]


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, _Flags]:
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
    add("--events_per_shard", type=_positive, default=EVENTS_PER_SHARD, help="events of a partition, over its splits")
    add("--shard_format", choices=tuple(SHARD_SUFFIXES), default="parquet", help="of the shards")
    add("--executor", default=LOCAL, metavar="NAME", help="local, or dask://HOST:PORT or a Dask scheduler's file")
    add("--workers", type=_positive, default=os.cpu_count(), help="processes of --executor local")
    add("--overwrite", action="store_true", help="replace a data set in DIR, and nothing else there")
    add("--verbose", action="store_true", help="say more of what was found")
    add("--like", metavar="DATA", help="use the vocabulary, statistics and rules of this data directory (path or URL)")
    add("--like_split", choices=SPLITS, default="test", help="of all patients, with --like")

    add(
        "--pseudonymize",
        type=Path,
        metavar="KEYFILE",
        help="keyed hashes instead of patients' ids, in all that is written",
    )

    own = parser.add_argument_group("not with --like, which has them from DATA", argument_default=argparse.SUPPRESS)
    rule = own.add_argument
    split_actions = [
        rule(
            "--split_fractions",
            type=_fractions,
            metavar="F,F,F",
            help=f"of {', '.join(SPLITS)} (default: 0.64,0.16,0.20)",
        ),
        rule("--split_seed", type=int, help="another seed, another split (default: 0)"),
    ]
    rule_actions = [
        rule("--ranges", type=Path, metavar="FILE", help="CSV: variable, low, high and perhaps action, reject or clip"),
        rule("--outlier_std", type=_above_zero, metavar="K", help="values K standard deviations off are outliers"),
        rule("--outlier_action", choices=ACTIONS, help="for outliers (default: reject)"),
        rule("--aggregate", choices=AGGREGATES, help="events of one variable in one set (default: none)"),
        rule("--min_events", type=_positive, help="of a patient; shorter ones are left out (default: 1)"),
        rule("--min_count", type=_positive, help="of a variable in train; rarer ones are unknown (default: 1)"),
    ]

    some = parser.add_argument_group("taken by some formats", argument_default=argparse.SUPPRESS)
    source = some.add_argument
    source_actions = [
        source("--labels", dest="labels_file", type=Path, metavar="PATH", help="outcomes, CSV or Parquet"),
        source("--label_column", metavar="NAME", help="of the outcome in --labels"),
        source(
            "--embeddings",
            dest="embeddings_file",
            type=Path,
            metavar="FILE",
            help="CSV: Key, and a vector for each variable",
        ),
        source("--labelled_only", action="store_true", help="meds: leave subjects without a sample in --labels out"),
        source("--origin_code", metavar="CODE", help="meds: minutes count from it; else from the first but birth"),
        source(
            "--exclude_codes",
            nargs="+",
            metavar="REGEX",
            help=f"meds: codes to reject, or none; else {' '.join(EXCLUDE_CODES)}",
        ),
        source(
            "--split_map",
            type=_split_map,
            metavar="NAME=SPLIT,…",
            help="meds: splits of subject_splits.parquet; else train=train,tuning=valid,held_out=test",
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
    actions = (source_actions, rule_actions, split_actions)
    flags = _Flags(*({flag.dest: vars(given)[flag.dest] for flag in some if flag.dest in given} for some in actions))
    if "exclude_codes" in flags.source:
        flags.source["exclude_codes"] = tuple(code for code in given.exclude_codes if code != "none")
    if "ranges" in flags.rules:
        flags.rules["ranges"] = read_ranges(given.ranges)
    split = {name.removeprefix("split_"): value for name, value in flags.split.items()}
    if given.like is not None:
        taken = [*flags.split] + ["embeddings"] * ("embeddings_file" in flags.source)
        if taken:
            raise UserError(f"--{taken[0]}: not used with --like; leave it out")
    elif "outlier_action" in flags.rules and "outlier_std" not in flags.rules:
        raise UserError("--outlier_action: says nothing without --outlier_std; give both")
    return given, flags._replace(split=split)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _fractions(text: str) -> tuple[float, float, float]:
    parts = [float(part) for part in text.split(",")]
    if len(parts) != len(SPLITS) or min(parts) < 0 or parts[0] == 0 or not math.isclose(sum(parts), 1.0):
        raise argparse.ArgumentTypeError(f"{text!r} is not three fractions that sum to 1, the first above 0")
    train, valid, test = parts
    return train, valid, test


def _split_map(text: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple((name, split) for name, _, split in (part.rpartition("=") for part in text.split(",")))
    if len({name for name, _ in pairs}) < len(pairs) or not {split for _, split in pairs} <= set(SPLITS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=SPLIT,…, each name once, a split one of {', '.join(SPLITS)}"
        )
    return pairs


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _above_zero(text: str) -> float:
    if not (0 < (number := float(text)) < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
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
