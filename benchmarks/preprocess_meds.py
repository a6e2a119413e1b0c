"""33 M events in MEDS form to shards: preprocess.py, Polars' own read, sort and write, and meds-torch-data's pipeline.

    python -m benchmarks.preprocess_meds RECORDS [--copies 20] [--rounds 2] [--mtd MTD_preprocess] [--output FILE.json]

RECORDS is a folder of PhysioNet-2012 record files (set A).  They are copied under new ids to a MEDS 0.4 data set in a
temporary folder: a file a split and copy, sorted by subject and time, as MEDS has it.  Ways take turns; the best round
counts.  Every way is timed from the start of its process to its end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.machine import describe, publish
from benchmarks.preprocess import prepare, timed
from pipeline.prepare.clean import clean
from pipeline.prepare.sources.physionet2012 import PhysioNet2012
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE

SPLITS = ("held_out", "tuning", "train", "train", "train")
"""By the record's number."""

POLARS = """
import sys
import polars as pl
rows = pl.read_parquet(sys.argv[1] + "/data/**/*.parquet", columns=["subject_id", "time", "code", "numeric_value"])
rows.sort("subject_id", "time").write_parquet(sys.argv[2])
"""
MTD = """
import os, subprocess, sys
program, data, output = sys.argv[1:]
os.environ["PATH"] = os.path.dirname(program) + os.pathsep + os.environ["PATH"]  # it starts others beside it
subprocess.run([program, f"MEDS_dataset_dir={data}", f"output_dir={output}"], check=True, stdout=subprocess.DEVNULL)
"""


def write_meds(records: Path, copies: int, folder: Path) -> int:
    """Returns the number of events."""
    source = PhysioNet2012(path=records)
    events = pl.concat(clean(next(source.read(piece)))[0] for piece in source.pieces()).select(
        pl.col(PATIENT_ID).cast(pl.String).cast(pl.Int64).alias("subject_id"),
        (pl.lit(datetime(2000, 1, 1)) + pl.duration(minutes=pl.col(MINUTE))).cast(pl.Datetime("us")).alias("time"),
        pl.col(VARIABLE).cast(pl.String).alias("code"),
        pl.col(VALUE).alias("numeric_value"),
    )
    events = events.sort("subject_id", "time", maintain_order=True)
    splits = []
    for copy in range(copies):
        copied = events.with_columns(pl.col("subject_id") + copy * 1_000_000)
        for split in set(SPLITS):
            numbers = [number for number, name in enumerate(SPLITS) if name == split]
            part = copied.filter((pl.col("subject_id") % len(SPLITS)).is_in(numbers))
            path = folder / "data" / split / f"{copy}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_parquet(path)
            splits.append(part.select(pl.col("subject_id").unique(), pl.lit(split).alias("split")))
    metadata = folder / "metadata"
    metadata.mkdir()
    pl.concat(splits).write_parquet(metadata / "subject_splits.parquet")
    codes = events.select(pl.col("code").unique().sort(), description=pl.lit(None, pl.String))
    codes.with_columns(parent_codes=pl.lit(None, pl.List(pl.String))).write_parquet(metadata / "codes.parquet")
    (metadata / "dataset.json").write_text(json.dumps({"dataset_name": "set A", "meds_version": "0.4.0"}))
    return events.height * copies


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preprocess.py on MEDS.", allow_abbrev=False)
    parser.add_argument("records", type=Path, metavar="RECORDS")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--mtd", type=Path, help="the program MTD_preprocess of meds-torch-data, perhaps of another venv"
    )
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_events = write_meds(given.records, given.copies, folder / "meds")
        data = str(folder / "meds")
        rounds: dict[str, list[dict[str, Any]]] = {}
        for _ in range(given.rounds):
            rounds.setdefault("preprocess.py", []).append(prepare(folder / "meds", folder / "ours"))
            others = {"polars read, sort, write": ["-c", POLARS, data, str(folder / "sorted.parquet")]}
            if given.mtd:
                others["meds-torch-data"] = ["-c", MTD, str(given.mtd), data, str(folder / "mtd")]
            for way, command in others.items():
                seconds, peak = timed(command)
                figures = {"seconds": round(seconds, 2), "rows_per_second": round(num_events / seconds)}
                rounds.setdefault(way, []).append(
                    figures | ({} if way == "meds-torch-data" else {"peak_rss_bytes": peak})
                )
            shutil.rmtree(folder / "mtd", ignore_errors=True)
    best = {way: min(figures, key=lambda round_: round_["seconds"]) for way, figures in rounds.items()}
    ours = best["preprocess.py"]["seconds"]
    ratios = {way: round(figures["seconds"] / ours, 2) for way, figures in best.items()}
    result = {"machine": describe(), "events": num_events, "ways": best, "times_the_seconds_of_preprocess": ratios}
    publish(result, given.output)


if __name__ == "__main__":
    main()
