"""Results of the parts of ``benchmarks/gpu.sh``: JSON files that are whole at every moment.

    python -m benchmarks.gpu.results FILE.json --part NAME --exit_code N --seconds S --limit L --log FILE

A part writes its file again after every figure, so what was measured survives whatever ends the part.  The command
above runs when a part has ended and notes how.  It imports the standard library alone: it must work where torch or the
project cannot be imported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

CUT_OFF_EXIT_CODES = (124, 137, 143)
"""``timeout`` ends with 124 when its signal sufficed, with 137 when it had to kill."""


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """Command line of a part.

    Attributes:
        output: JSON file that the part writes.
        data_dir: Data directory to measure on.
        ends_at: Time at which the part is cut off, in seconds since 1970.
        quick: Whether sizes and times are cut down, so that the whole script takes less than a minute on a CPU.
    """

    output: Path
    data_dir: Path
    ends_at: float
    quick: bool

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.time()

    @classmethod
    def parse(cls, description: str | None, arguments: list[str] | None = None) -> Self:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("output", type=Path, help="JSON file to write")
        parser.add_argument("--data_dir", type=Path, required=True, help="data directory made by preprocess.py")
        parser.add_argument("--ends_at", type=float, default=time.time() + 120, help="when to have ended, Unix time")
        parser.add_argument("--quick", action="store_true", help="cut sizes and times down")
        return cls(**vars(parser.parse_args(arguments)))


class Result:
    """The JSON file of one part.

    Args:
        path: File to write; an existing one is replaced.
        part: Name of the part.
    """

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"part": part, "state": "unfinished", **describe_machine()}
        self.write()

    def update(self, **values: object) -> None:
        """Add or replace values, and write."""
        self.content.update(values)
        self.write()

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to the list ``name``, and write."""
        self.content.setdefault(name, []).append(row)
        self.write()

    def write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def describe_machine() -> dict[str, Any]:
    """Return card, driver, date, versions and commit, as ``gpu.sh`` and this process know them."""
    torch = sys.modules.get("torch")
    seen = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "none"
    return {
        "card": os.environ.get("GPU_CARD") or seen,
        "driver": os.environ.get("GPU_DRIVER") or "none",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__ if torch else _version("torch"),
        "triton": _version("triton"),
        "cuda": torch.version.cuda if torch else None,
        "commit": os.environ.get("GPU_COMMIT") or "unknown",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {names[0] if names else platform.processor() or 'unknown'}"


def close(path: Path, *, part: str, exit_code: int, seconds: float, limit: float, log: Path | None) -> None:
    """Note in the file of a part how the part ended; where the part wrote none, write one that says so."""
    content: dict[str, Any]
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"part": part, **describe_machine()}
    if exit_code == 0:
        content["state"] = "done"
    elif exit_code in CUT_OFF_EXIT_CODES and seconds >= limit:
        content["state"] = f"cut off after {seconds:.0f} s"
    else:
        content["state"] = f"failed (exit code {exit_code})"
    content["seconds"] = seconds
    if exit_code and log is not None and log.exists():
        content["log"] = [line[:500] for line in log.read_text(errors="replace").splitlines()[-25:]]
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--part", required=True)
    parser.add_argument("--exit_code", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--log", type=Path)
    close(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
