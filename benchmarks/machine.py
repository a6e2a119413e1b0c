"""What a figure was measured on, and where a result goes."""

from __future__ import annotations

import datetime
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.machine import usable_cores


def describe() -> dict[str, object]:
    """Hardware, date and versions, for the head of a result."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{usable_cores()} cores, {model}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def publish(result: Mapping[str, object], output: Path | None) -> None:
    """Print a result as JSON and, where asked, keep it."""
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before ``--``, and the flags of another program after it."""
    before = list(itertools.takewhile(lambda word: word != "--", arguments))
    return before, list(arguments[len(before) + 1 :])
