"""What a figure was measured on, and how fast that machine multiplies matrices."""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path

import torch


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
        "hardware": f"{os.cpu_count()} cores, {model}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matrix_rate(dtype: torch.dtype, size: int = 4096, seconds: float = 2.0) -> float:
    """FLOP/s of a product of two square matrices on the CPU, after one to warm up."""
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    out = a @ b
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.mm(a, b, out=out)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)
