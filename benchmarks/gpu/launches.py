"""Count the launches of a training step and the share of its time in which the GPU has nothing to do.

Both come from PyTorch's profiler, on batches of 16.  The profiler slows the host down, so the share of idle time
compares the time in which the GPU was busy with the time of steps that were not recorded.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.results import PartOptions, Result
from benchmarks.gpu.speed import wait
from benchmarks.steps import Batch, Precision, Preset, Stepper, endless_batches, new_model, num_codes

BATCH_SIZE = 16
WARM_UP_STEPS, TIMED_STEPS, RECORDED_STEPS = 3, 10, 3
DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of the CUDA runtime in which the host waits for the GPU."""


def main() -> None:
    options = PartOptions.parse(__doc__)
    result = Result(options.output, "launches")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2 if options.quick else BATCH_SIZE
    result.update(device=device, batch_size=size, rows=[])
    count = 2 if options.quick else TIMED_STEPS
    batches = list(itertools.islice(endless_batches(options.data_dir, size, device=device), count))
    cells: list[tuple[Precision, Preset]] = [
        ("bf16", "small"), ("bf16", "reference"), ("fp32", "small"), ("fp32", "reference")
    ]  # fmt: skip
    for precision, preset in cells[:1] if options.quick else cells:
        stepper = Stepper(new_model(preset, num_codes(options.data_dir)), precision, device=device)
        row = {"preset": preset, "precision": precision}
        result.append("rows", row | measure(stepper, batches))


def measure(stepper: Stepper, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return what :func:`summarise` finds in a trace of some steps, and the time of a step that is not recorded."""
    on_gpu = stepper.world.device.type == "cuda"
    warm_up, timed, recorded = (WARM_UP_STEPS, TIMED_STEPS, RECORDED_STEPS) if on_gpu else (1, 1, 1)
    cycle = itertools.cycle(batches)
    for batch in itertools.islice(cycle, warm_up):
        stepper.step(batch)
    wait(on_gpu)
    started = time.perf_counter()
    for batch in itertools.islice(cycle, timed):
        stepper.step(batch)
    wait(on_gpu)
    seconds = (time.perf_counter() - started) / timed
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for batch in itertools.islice(cycle, recorded):
            stepper.step(batch)
        wait(on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return {"step_milliseconds": 1e3 * seconds, **summarise(events, recorded, seconds)}


def summarise(events: Iterable[dict[str, Any]], steps: int, step_seconds: float) -> dict[str, Any]:
    """Count launches and busy time in a trace.

    Args:
        events: ``traceEvents`` of a Chrome trace; their times are in microseconds.
        steps: Number of training steps in the trace.
        step_seconds: Time of a step that is not recorded.

    Returns:
        Figures of one step.  ``launches``, ``busy_milliseconds``, ``idle_share``, ``waits`` and ``kernels`` are None
        where the profiler saw no GPU.
    """
    events = [event for event in events if event.get("ph") == "X"]
    operations = sum(event.get("cat") == "cpu_op" for event in events) / steps
    on_device = [event for event in events if event.get("cat") in DEVICE_CATEGORIES]
    figures: dict[str, Any] = dict.fromkeys(("launches", "busy_milliseconds", "idle_share", "waits", "kernels"))
    if on_device:
        busy = busy_microseconds([(event["ts"], event["ts"] + event["dur"]) for event in on_device]) / 1e6 / steps
        names, times = Counter[str](), Counter[str]()
        for event in on_device:
            names[event["name"]] += 1
            times[event["name"]] += event["dur"]
        waits = Counter(event["name"] for event in events if event.get("name") in WAITS)
        figures = {
            "launches": len(on_device) / steps,
            "busy_milliseconds": 1e3 * busy,
            "idle_share": max(0.0, 1 - busy / step_seconds),
            "waits": {name: count / steps for name, count in waits.items()},
            "kernels": [
                {"name": name[:120], "launches": names[name] / steps, "milliseconds": time / 1e3 / steps}
                for name, time in times.most_common(15)
            ],
        }
    return {"host_operations": operations, **figures}


def busy_microseconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals, which may overlap (several streams)."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


if __name__ == "__main__":
    main()
