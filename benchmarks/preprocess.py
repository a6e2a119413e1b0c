"""Rows/s and peak memory of preprocess.py, beside what Polars alone needs to read, sort and write the same rows.

    python -m benchmarks.preprocess [INPUT …] [--num_patients 4000] [--rounds 3] [--output FILE.json]

A long Parquet table of synthetic stays is prepared by the program, from start to exit, report included; and is read,
sorted by patient and minute, and written by Polars in a process of its own: what no preparation can do without.  Each
INPUT (as ``preprocess.py`` takes it) is prepared as well.  Ways take turns; the best round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.machine import describe
from pipeline.prepare.clean import clean
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.schema import MINUTE, PATIENT_ID, SUMMARY_FILE, VALUE, VARIABLE

ROOT = Path(__file__).parents[1]
POLARS = f"""
import sys
import polars as pl
pl.read_parquet(sys.argv[1]).sort({PATIENT_ID!r}, {MINUTE!r}).write_parquet(sys.argv[2])
"""


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds of a process, and the most bytes resident in it; children it waited for do not count."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command}: {message.decode()}")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare(path: Path, output: Path) -> dict[str, Any]:
    """One run of the program; its figures."""
    seconds, _ = timed(["preprocess.py", str(path), "--output", str(output), "--overwrite"])
    summary = json.loads((output / SUMMARY_FILE).read_text())
    return {
        "seconds": round(seconds, 2),
        "seconds_without_start_and_report": summary["seconds"],
        "rows": summary["events_in"],
        "rows_per_second": round(summary["events_in"] / seconds),
        "peak_rss_bytes": summary["peak_rss_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preprocess.py.", allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT")
    parser.add_argument("--num_patients", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = folder / "synthetic.parquet"
        source = Synthetic(num_patients=given.num_patients)
        events = pl.concat(clean(next(source.read(piece)))[0] for piece in source.pieces())
        events = events.select(PATIENT_ID, MINUTE, VARIABLE, VALUE).sample(fraction=1.0, shuffle=True, seed=0)
        events.write_parquet(table)

        rounds: dict[str, list[dict[str, Any]]] = {}
        for _ in range(given.rounds):
            for number, path in enumerate([table, *given.inputs]):
                rounds.setdefault(f"preprocess {path.name}", []).append(prepare(path.resolve(), folder / str(number)))
            seconds, peak = timed(["-c", POLARS, str(table), str(folder / "sorted.parquet")])
            polars = {
                "seconds": round(seconds, 2),
                "rows": events.height,
                "rows_per_second": round(events.height / seconds),
                "peak_rss_bytes": peak,
            }
            rounds.setdefault(f"polars read, sort, write {table.name}", []).append(polars)
    best = {way: min(figures, key=lambda round_: round_["seconds"]) for way, figures in rounds.items()}
    result = json.dumps({"machine": describe(), "ways": best}, indent=1)
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
