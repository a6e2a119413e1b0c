"""What a figure was measured on, and where a result goes."""

from __future__ import annotations

import datetime
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

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


def measure_matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the FLOP/s of a product of two large square matrices."""
    size = 8192 if torch.device(device).type == "cuda" else 4096
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    matrices = {"mm": torch.mm, "a": a, "b": b, "out": torch.empty_like(a)}
    timer = Timer("mm(a, b, out=out)", globals=matrices, num_threads=torch.get_num_threads())
    return float(2 * size**3 / timer.blocked_autorange(min_run_time=2.0).median)


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
