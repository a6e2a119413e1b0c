"""What large data sets cost to prepare, and what breaks first: computed from measured constants, measuring nothing.

    python -m benchmarks.scale_costs [--write docs/scale.md]

Rates come from the results of ``preprocess_meds`` and ``preprocess_scale``, the other constants from those of
``scale_constants``; the sizes of pieces, partitions and batches from the code.  ``--write`` puts the tables in a page.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipeline.prepare.merge import MAX_SPILLS, STEP_ROWS, count_merged
from pipeline.prepare.options import EVENTS_PER_SHARD
from pipeline.prepare.sources.reading import PIECE_BYTES, ROW_BYTES

RESULTS: Final = Path(__file__).parent / "results"
WORKERS: Final = (1, 2, 4, 8, 16, 100)
SERIAL_WORKERS: Final = 16
"""Workers at which the serial part is looked at."""
WORKER_BYTES: Final = 2.0 * (1 << 30)
"""Memory of a worker, as in the example of docs/distributed.md."""
MAIN_BYTES: Final = 16.0 * (1 << 30)
"""Memory of the machine of the calling process, and of a scheduler's."""
REJECT_SHARE: Final = 6_223 / 1_678_892
"""As of the rows of PhysioNet-2012 set A."""

Constants = dict[str, float]
"""By name: seconds, of one core, and bytes."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A data set."""

    name: str
    events: float
    patients: float
    variables: float

    @property
    def pieces(self) -> int:
        return math.ceil(self.events * ROW_BYTES / PIECE_BYTES)

    @property
    def partitions(self) -> int:
        return math.ceil(self.events / EVENTS_PER_SHARD)

    @property
    def merged(self) -> tuple[int, int]:
        """Of the spills, one a piece, those that are merged, and to how many."""
        return count_merged(self.pieces, MAX_SPILLS)

    @property
    def files(self) -> int:
        """From which a partition is cut."""
        merged, groups = self.merged
        return self.pieces - merged + groups

    @property
    def tasks(self) -> int:
        return self.pieces + 2 * self.partitions + self.merged[1]

    @property
    def pairs(self) -> float:
        """Of a partition and a variable in it; at the most."""
        return self.partitions * self.variables

    def scaled(self, events: float) -> Scenario:
        """The same kind of data, with more or fewer patients."""
        return replace(self, events=events, patients=self.patients * events / self.events)


SCENARIOS: Final = (
    Scenario(name="MIMIC-IV charts", events=433e6, patients=94e3, variables=2.3e3),
    Scenario(name="AmsterdamUMCdb", events=1e9, patients=23e3, variables=2.5e3),
    Scenario(name="a national registry", events=100e9, patients=50e6, variables=50e3),
)


def read_constants() -> Constants:
    scale, meds, own = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("preprocess_scale", "preprocess_meds", "scale_constants")
    )
    run, largest = meds["ways"]["preprocess.py"], scale["rows"][-1]
    cores = int(meds["machine"]["hardware"].split()[0])
    return {
        **own["constants"],
        "seconds_per_event": run["seconds"] * cores / meds["events"],
        "data_bytes_per_event": largest["data_bytes_per_event"],
        "work_bytes_per_event": largest["peak_disk_bytes_per_event"],
        "worker_bytes": largest["peak_rss_bytes_one_process"],
    }


def reopening(it: Scenario, c: Constants) -> float:
    """Core-seconds of opening spills for partitions and for steps of a merge: what is not linear in the events."""
    merged, groups = it.merged
    steps = it.events * merged / it.pieces / STEP_ROWS * merged / max(groups, 1)
    named = c["seconds_per_spill"] + it.variables * c["seconds_per_spill_and_variable"]
    return it.files * it.partitions * named + steps * c["seconds_per_spill"]


def merging(it: Scenario, c: Constants) -> float:
    """Core-seconds of merging spills."""
    return it.merged[0] / it.pieces * it.events * c["merge_seconds_per_event"]


def gathering(it: Scenario, c: Constants) -> float:
    """Core-seconds of gathering moments."""
    return it.pairs * c["gather_seconds_per_partition_and_variable"]


def joining(it: Scenario, c: Constants) -> float:
    """Core-seconds of joining rejects, which the calling process does while workers write."""
    return it.events * REJECT_SHARE * c["seconds_per_reject"]


def fingerprint(it: Scenario, c: Constants) -> float:
    """Core-seconds of hashing the input."""
    return it.events * c["input_bytes_per_event"] * c["hash_seconds_per_byte"]


def linear(it: Scenario, c: Constants) -> float:
    """Core-seconds of reading, sorting and writing, and of hashing the input before."""
    return it.events * c["seconds_per_event"] + it.tasks * c["seconds_per_task"] + fingerprint(it, c)


def shared(it: Scenario, c: Constants) -> float:
    """Core-seconds of all that workers do."""
    return linear(it, c) + reopening(it, c) + merging(it, c) + gathering(it, c) + joining(it, c)


def serial(it: Scenario, c: Constants) -> float:
    """Seconds of the calling process while no worker works."""
    return it.patients * c["main_seconds_per_patient"] + it.partitions * c["main_seconds_per_partition"]


def wall(it: Scenario, c: Constants, workers: int) -> float:
    """Seconds; where the tasks of a stage are no multiple of the workers, some of these wait at its end."""
    waiting = math.ceil(it.partitions / workers) * workers / it.partitions
    scheduling = it.tasks * c["scheduler_seconds_per_task"] * (workers > 1)
    return serial(it, c) + scheduling + shared(it, c) / workers * waiting


def moved(it: Scenario, c: Constants) -> float:
    """Bytes that are read and written."""
    spills = 2 * (1 + it.merged[0] / it.pieces) * c["spill_bytes_per_event"]
    others = 2 * (c["input_bytes_per_event"] + c["sorted_bytes_per_event"]) + c["data_bytes_per_event"]
    return it.events * (spills + others)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Something that grows with the data, how much of it there may be, and how it is shown."""

    what: str
    most: float
    show: Callable[[float], str]
    of: Callable[[Scenario, Constants], float]

    def reached_at(self, kind: Scenario, c: Constants) -> float:
        """Events of data of this kind; infinite from 10^15 on."""
        low, high = 1e3, 1e15
        if self.of(kind.scaled(high), c) < self.most:
            return math.inf
        while high > 1.001 * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.of(kind.scaled(middle), c) >= self.most else (middle, high)
        return high


def number(value: float) -> str:
    return "never" if math.isinf(value) else _in_units(value, ("", "k", "M", "B", "T", "Q"))


def size(value: float) -> str:
    return _in_units(value, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def duration(seconds: float) -> str:
    for unit, word in ((365 * 86400.0, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return _in_units(seconds / unit, (word,))
    return _in_units(seconds, ("s",))


def _in_units(value: float, words: Sequence[str]) -> str:
    """Two digits, in thousands where there are words for them."""
    power = min(max(0, math.floor(math.log10(float(f"{value:.2g}") or 1) / 3)), len(words) - 1)
    return f"{float(f'{value / 1000**power:.2g}'):,.10g} {words[power]}".rstrip()


LIMITS: Final = (
    Limit(
        what="memory of a worker that reads a gzipped CSV with all the events",
        most=WORKER_BYTES,
        show=size,
        of=lambda it, c: c["gzip_bytes"] + it.events * c["gzip_bytes_per_event"],
    ),
    Limit(
        what="opening, merging, gathering and joining, as a part of all other work",
        most=1.0,
        show=lambda part: f"{part:.1%}" if part < 1 else f"{number(part)} ×",
        of=lambda it, c: shared(it, c) / linear(it, c) - 1,
    ),
    Limit(
        what="memory of a worker that sorts or merges: a little of every spill",
        most=WORKER_BYTES,
        show=size,
        of=lambda it, c: c["worker_bytes"] + max(it.files, min(it.pieces, MAX_SPILLS)) * c["sort_bytes_per_spill"],
    ),
    Limit(
        what="memory of the calling process: counts of each piece and partition, and shards",
        most=MAIN_BYTES,
        show=size,
        of=lambda it, c: c["base_bytes"] + it.partitions * c["main_bytes_per_partition"],
    ),
    Limit(
        what="memory of the calling process: labels, splits, index and report, of each patient",
        most=MAIN_BYTES,
        show=size,
        of=lambda it, c: c["base_bytes"] + it.patients * c["main_bytes_per_patient"],
    ),
    Limit(
        what="memory of a Dask scheduler: what tasks are called with",
        most=MAIN_BYTES,
        show=size,
        of=lambda it, c: max(it.pieces, it.partitions) * c["scheduler_bytes_per_task"],
    ),
    Limit(
        what="time in which only the calling process works: labels and index",
        most=3600.0,
        show=duration,
        of=serial,
    ),
    Limit(
        what="moments on disk, of each partition and variable",
        most=10e12,
        show=size,
        of=lambda it, c: it.pairs * c["moments_bytes_per_partition_and_variable"],
    ),
    Limit(
        what="files at a time in the work folder, against a quota: spills, sorted, moments, rejects, journal, index",
        most=1e6,
        show=number,
        of=lambda it, _: 5 * it.pieces + 11 * it.partitions,
    ),
    Limit(
        what="the manifest, which every process that trains reads whole",
        most=1e9,
        show=size,
        of=lambda it, c: 3 * it.partitions * c["manifest_bytes_per_shard"],
    ),
)


def tables(c: Constants) -> dict[str, str]:
    """In Markdown, by the name of their place in the page."""

    def row(what: str, show: Callable[[float], str], of: Callable[[Scenario], float]) -> list[str]:
        return [what, *(show(of(it)) for it in SCENARIOS)]

    costs = [
        row("events", number, lambda it: it.events),
        row("patients, assumed", number, lambda it: it.patients),
        row("variables, assumed", number, lambda it: it.variables),
        row("tasks that read", number, lambda it: it.pieces),
        row("tasks that sort, and as many that write", number, lambda it: it.partitions),
        row("input as Parquet", size, lambda it: it.events * c["input_bytes_per_event"]),
        row("disk for the work", size, lambda it: it.events * c["work_bytes_per_event"]),
        row("the result", size, lambda it: it.events * c["data_bytes_per_event"]),
        row("read and written in all", size, lambda it: moved(it, c)),
        row("core-hours", number, lambda it: (serial(it, c) + shared(it, c)) / 3600),
        row("… linear in the events", number, lambda it: linear(it, c) / 3600),
        row("… … of them for the fingerprint", number, lambda it: fingerprint(it, c) / 3600),
        row("… merging spills", number, lambda it: merging(it, c) / 3600),
        row("… opening spills again", number, lambda it: reopening(it, c) / 3600),
        row("… gathering moments", number, lambda it: gathering(it, c) / 3600),
        row("… joining rejects", number, lambda it: joining(it, c) / 3600),
        row("… of the calling process alone", number, lambda it: serial(it, c) / 3600),
        row(
            "all, to the linear part",
            lambda part: f"{part:.2f} ×",
            lambda it: (serial(it, c) + shared(it, c)) / linear(it, c),
        ),
    ]
    for workers in WORKERS:
        name = f"wall time, {workers} worker{'s' * (workers > 1)}"
        costs.append([name, *(duration(wall(it, c, workers)) for it in SCENARIOS)])
    part = f"… of which the calling process works alone, for {SERIAL_WORKERS}"
    costs.append(row(part, lambda share: f"{share:.1%}", lambda it: serial(it, c) / wall(it, c, SERIAL_WORKERS)))
    busiest = WORKERS[-1]
    name = f"… which ask of the file system, for {busiest}"
    costs.append(row(name, lambda rate: f"{size(rate)}/s", lambda it: moved(it, c) / wall(it, c, busiest)))

    kind = SCENARIOS[-1]
    breaks = [
        [limit.what, limit.show(limit.most), *(limit.show(limit.of(it, c)) for it in SCENARIOS), number(at)]
        for limit, at in sorted(((limit, limit.reached_at(kind, c)) for limit in LIMITS), key=lambda pair: pair[1])
    ]
    longest = (WORKER_BYTES - c["base_bytes"]) / c["sort_bytes_per_event"]
    alone = [
        [f"events of one patient: it is sorted in {size(WORKER_BYTES)} of memory", number(longest)],
        ["events of one patient: offsets are int32", number(2.0**31)],
    ]
    names = [it.name for it in SCENARIOS]
    return {
        "costs": _table(["", *names], costs),
        "breaks": _table(["what grows", "limit", *names, f"events, as in {kind.name}, at which it is reached"], breaks),
        "alone": _table(["however many patients there are", "limit"], alone),
        "constants": _table(
            ["measured", ""], [[name.replace("_", " "), f"{value:.3g}"] for name, value in sorted(c.items())]
        ),
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def filled(page: str, content: dict[str, str]) -> str:
    """The page, with the table NAME between each ``<!-- NAME -->`` and the next ``<!-- end -->``."""

    def put(place: re.Match[str]) -> str:
        return f"<!-- {place[1]} -->\n{content[place[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)


def main() -> None:
    run_tables("Compute what large data sets cost.", lambda: tables(read_constants()))


def run_tables(description: str, make: Callable[[], dict[str, str]]) -> None:
    """Run the command line of a page's tables: put them into the page, or print them."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="a page to put the tables into; else print them")
    given = parser.parse_args()
    content = make()
    if given.write:
        given.write.write_text(filled(given.write.read_text(encoding="utf-8"), content), encoding="utf-8")
    else:
        print("\n\n".join(content.values()))


if __name__ == "__main__":
    main()
