"""Coverage-guided fuzzing of what reads bytes in Python: inputs that reach new lines are kept and changed further.

    pip install atheris
    python -m tests.faults.coverage_guided [--runs 100000] [--output FILE.json]

Each target must give what it reads or raise what its callers expect; anything else, or ten seconds for one input, ends
the run with the input that did it.  Targets are a tar shard, a manifest whose checksum is right, a PhysioNet record,
and a CSV file whose rows must be the same read in pieces; the last two, which Polars reads, get a tenth of the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

# The project is imported where it is fuzzed, by which time its lines are counted.
RECORD = b"00:00,RecordID,1\n00:00,Age,54\n00:07,HR,73\n47:59,Temp,-1\n"


def tar(folder: Path) -> tuple[Callable[[bytes], object], bytes]:
    shards, data_dirs = import_module("pipeline.dataset.shards"), import_module("tests.data_dirs")
    path = folder / "00000.tar"
    shards.write_tar(data_dirs.shard_table(data_dirs.make_patients([[1], [2, 3]])), path, "00000")

    def read(content: bytes) -> None:
        path.write_bytes(content)
        # As ``read_shard`` does.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException):
            shards._read_rows(path, ".tar")

    return read, path.read_bytes()


def manifest(folder: Path) -> tuple[Callable[[bytes], object], bytes]:
    manifests, files = import_module("pipeline.dataset.manifest"), import_module("pipeline.storage.files")
    data_dirs = import_module("tests.data_dirs")
    patients = data_dirs.make_patients([[1], [2, 3]])
    data = data_dirs.write_data_dir(folder / "data", {"train": patients, "valid": patients, "test": []})
    path = data / "manifest.json"
    content: dict[str, Any] = json.loads(path.read_bytes())
    del content["sha256"]

    def load(content: bytes) -> None:
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            with contextlib.suppress(ValueError, RecursionError):  # what has no JSON form has no checksum
                content = json.dumps(files.seal(parsed)).encode()
        path.write_bytes(content)
        with contextlib.suppress(manifests.UserError):
            manifests.Manifest.load(data)

    return load, json.dumps(content).encode()


def record(folder: Path) -> tuple[Callable[[bytes], object], bytes]:
    physionet2012 = import_module("pipeline.prepare.sources.physionet2012")
    header = f"{physionet2012.HEADER}\n".encode()
    path = folder / "set" / "1.txt"
    path.parent.mkdir()
    path.touch()

    def read(content: bytes) -> None:
        path.write_bytes(header + content)
        lines = (header + content.replace(b"\r\n", b"\n")).rstrip(b"\n").count(b"\n")
        with contextlib.suppress(physionet2012.UserError):
            source = physionet2012.PhysioNet2012(path=path.parent)
            (rows,) = (next(source.read(piece)).rows for piece in source.pieces())
            assert rows.height == lines, "a row a line"

    return read, RECORD


def csv(folder: Path) -> tuple[Callable[[bytes], object], bytes]:
    table, csv_files = (
        import_module("pipeline.prepare.sources.table"),
        import_module("pipeline.prepare.sources.csv_files"),
    )
    path = folder / "rows.csv"
    path.touch()

    def read(content: bytes) -> None:
        path.write_bytes(b"patient_id,minute,variable,value\n" + content)
        found = []
        for piece_bytes in (1 << 20, 16):
            csv_files.PIECE_BYTES, table.PIECE_BYTES = piece_bytes, 0
            with contextlib.suppress(table.UserError):
                source = table.Table(path=path)
                found.append([row for piece in source.pieces() for row in next(source.read(piece)).rows.rows()])
        assert len(found) < 2 or found[0] == found[1], "pieces are the file"

    return read, b'1,0,HR,80\n"1",5.5,"a ""b"", c",\n2,1,"two\nlines",-1e3\n'


TARGETS = {"tar": tar, "manifest": manifest, "record": record, "csv": csv}


def fuzz(name: str, runs: int) -> None:
    """Never returns: the fuzzer ends the process."""
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=["pipeline"]), tempfile.TemporaryDirectory(dir="/dev/shm") as given:
        folder = Path(given)
        target, seed = TARGETS[name](folder)
        corpus = folder / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(seed)
        flags = [f"-runs={runs}", "-seed=1", "-timeout=10", "-print_final_stats=1", f"-artifact_prefix={name}_"]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], target)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        fuzz(options.target, options.runs)
    machine = import_module("benchmarks.machine")
    result: dict[str, object] = {**machine.describe()}
    for name in TARGETS:
        runs = str(options.runs // (10 if name in ("record", "csv") else 1))
        command = [sys.executable, "-m", "tests.faults.coverage_guided", "--target", name, "--runs", runs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        tried = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        kept = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", done.stderr)
        assert tried is not None
        result[name] = {
            "tried": int(tried[1]),
            "failed": 0,
            "places_reached": int(kept[-1][0]),
            "kept": int(kept[-1][1]),
        }
    machine.publish(result, options.output)


if __name__ == "__main__":
    main()
