"""Time and memory of preprocess.py on one packed CSV file, beside the same rows unpacked, and beside unpacking alone.

    python -m benchmarks.preprocess_gzip [--rows 200000000] [--workers 2] [--folder DIR] [--output FILE.json]

The rows are invented: stay, minute, item, value, a patient's rows together.  A packed file can be unpacked by one
process alone, so the rate to be reached is 0.7 of that of the unpacked rows, or what one core unpacks if that is less.
Both files are made first, which takes as long as either run; ``--folder`` says where (25 bytes a row).
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.machine import describe
from benchmarks.preprocess_scale import measure

ROWS_A_CHUNK = 2_000_000
ROWS_A_PATIENT = 400
ITEMS = 40


def write_rows(plain: Path, packed: Path, num_rows: int) -> None:
    """Write the same rows to a CSV file and to a packed one."""
    chance = np.random.default_rng(0)
    with plain.open("wb") as text, gzip.open(packed, "wb", compresslevel=1) as gz:
        for start in range(0, num_rows, ROWS_A_CHUNK):
            row = np.arange(start, min(start + ROWS_A_CHUNK, num_rows))
            frame = pl.DataFrame(
                {
                    "stay_id": 30_000_000 + row // ROWS_A_PATIENT,
                    "minute": row % ROWS_A_PATIENT * 7 + chance.integers(0, 7, len(row)),
                    "itemid": 220_045 + chance.integers(0, ITEMS, len(row)),
                    "valuenum": chance.normal(80, 12, len(row)).round(),
                }
            )
            content = frame.write_csv(include_header=start == 0, float_precision=0).encode()
            text.write(content)
            gz.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preprocess.py on a packed file.", allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    result = {"machine": describe(), "workers": given.workers, "rows": given.rows}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        plain, packed = folder / "rows.csv", folder / "packed.csv.gz"
        write_rows(plain, packed, given.rows)
        result |= {"bytes": plain.stat().st_size, "packed_bytes": packed.stat().st_size}
        started = time.monotonic()
        subprocess.run(["gzip", "-dc", str(packed)], check=True, stdout=subprocess.DEVNULL)
        result["rows_per_second_unpacked_alone"] = round(given.rows / (time.monotonic() - started))
        for path in (plain, packed):
            result[path.name] = measure([str(path)], given.workers, folder / "data" / path.name)
            print(path.name, json.dumps(result[path.name]), flush=True)
        rates = [result[path.name]["events_per_second"] for path in (packed, plain)]
        result["rate_to_unpacked"] = round(rates[0] / rates[1], 3)
    print(json.dumps(result, indent=1))
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
