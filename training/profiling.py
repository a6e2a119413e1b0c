"""Where the time of a training step goes: a trace of a few steps, and a table of its parts.

The parts are marked in the code with ``record_function``, which costs microseconds while nothing is recorded.  On a CPU
a part takes the time between its ends; on a GPU, the time of the kernels that were launched meanwhile, by any thread.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from model.kernels.ops import choose_kernels
from model.losses import LossOptions
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError

MODULES = ("encoder", "transformer", "decoder", "head")
PARTS = ("data", "copy", *MODULES, "losses", "backward", "optimiser")
COMMUNICATION = "communication"
"""A part of steps on several devices: what is left to wait for when the backward pass is over."""

WARM_UP_STEPS, PROFILED_STEPS = 10, 5
"""Few enough for a trace of some MB, whatever the batch: steps differ in length, not in their number of operations."""


def count_flops(model: SeqSetVAE, prepared: PreparedBatch, loss: LossOptions) -> dict[str, float]:
    """Return the operations of one step by part of the forward pass, and of the whole ``backward`` pass.

    They are counted by PyTorch's own counter while the step runs on the ``meta`` device: products of matrices alone,
    a multiplication and an addition each, rows of padding included.
    """
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 (half a second that only --profile needs)

    on_meta, batch = copy.deepcopy(model).to("meta").eval(), prepared.to("meta")
    on_meta.gradient_checkpointing = False
    with choose_kernels(False), FlopCounterMode(display=False) as counter:
        output = on_meta(batch, reconstruct=loss.learns_sets, classify=loss.learns_outcome)
        forward = counter.get_total_flops()
        outputs = (output.context, output.decoded, *(output.logits or ()), output.posterior.mu)
        torch.stack([tensor.float().sum() for tensor in outputs if tensor is not None]).sum().backward()
    counts = counter.get_flop_counts()
    # The counter's modules include their gradients, which take twice the operations of the forward pass.
    parts = {name: sum(counts.get(f"SeqSetVAE.{name}", {}).values()) / 3 for name in MODULES}
    return parts | {"backward": float(counter.get_total_flops() - forward)}


class StepProfiler:
    """Records ``PROFILED_STEPS`` steps after ``WARM_UP_STEPS`` while the context lasts, and costs nothing after.

    Args:
        path: of the trace, Chrome's format, gzipped; None = off.
        model, loss: whose operations are counted, and which parts of it a step runs.
        dtype: of its matrix products.
        steps: how many there will be before anything else, such as a validation; of fewer the last are recorded.

    Attributes:
        table: what was found, for ``summary.json``; None before, and where the run ended earlier.
    """

    def __init__(
        self, path: Path | None, model: SeqSetVAE, loss: LossOptions, dtype: torch.dtype, *, steps: int
    ) -> None:
        self.path, self.model, self.loss, self.dtype = path, model, loss, dtype
        self.device = next(model.parameters()).device
        self.table: dict[str, Any] | None = None
        if path is None:
            return
        if steps < 2:
            raise UserError(f"--profile: {steps} steps are left of this epoch, 2 are needed; lower --batch_size")
        active = min(PROFILED_STEPS, steps - 1)
        self._first = min(WARM_UP_STEPS, steps - active)
        self._last = self._first + active
        self._batches: list[list[PreparedBatch]] = []
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])],
            schedule=torch.profiler.schedule(skip_first=self._first - 1, wait=0, warmup=1, active=active, repeat=1),
            on_trace_ready=self._finish,
        )

    def __enter__(self) -> Self:
        if self.path is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None and self.table is None:
            self._profiler.on_trace_ready = None  # a part of a trace would look whole
            self._profiler.stop()

    def step(self, parts: list[PreparedBatch]) -> None:
        """Note that a step on ``parts`` is done."""
        if self.path is None or self.table is not None:
            return
        self._batches.append(parts)
        if self.device.type == "cuda" and len(self._batches) in (self._first, self._last):
            torch.cuda.synchronize()  # what is still under way belongs to the steps before
        self._profiler.step()
        if len(self._batches) == self._last:
            del self._profiler, self._batches  # hundreds of MB

    def _finish(self, profiler: torch.profiler.profile) -> None:
        assert self.path is not None
        partial = self.path.with_name(f"partial-{self.path.name}")
        profiler.export_chrome_trace(str(partial))
        partial.replace(self.path)
        recorded = self._batches[self._first :]
        counts = [[count_flops(self.model, part, self.loss) for part in parts] for parts in recorded]
        flops = [{name: sum(part[name] for part in parts) for name in parts[0]} for parts in counts]
        self.table = {
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "recorded_steps": len(recorded),
            "parts": tabulate(time_parts(profiler.events() or []), flops),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTimes:
    """Seconds of every part over all recorded steps, on the host and of the kernels launched meanwhile, if there were.

    ``whole`` is from the first part to the end of the last part or kernel.
    """

    host: dict[str, float]
    device: dict[str, float] | None
    whole: float


def time_parts(events: Iterable[FunctionEvent]) -> PartTimes:
    """Sum a profile's events, whose times are in microseconds, by part."""
    spans: list[tuple[float, float, str]] = []
    launches: list[tuple[float, float]] = []
    end = 0.0
    for event in events:
        start, stop = event.time_range.start, event.time_range.end
        if event.device_type.name != "CPU":
            end = max(end, stop)
        elif event.name in PARTS or event.name == COMMUNICATION:
            spans.append((start, stop, event.name))
        elif event.kernels and not event.is_user_annotation:  # whose kernels would be those of all inside
            launches.append((start, sum(kernel.duration for kernel in event.kernels)))
    spans.sort()
    host, device = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for start, stop, name in spans:
        host[name] = host.get(name, 0.0) + (stop - start) / 1e6
        device.setdefault(name, 0.0)
    for moment, duration in launches:
        index = bisect.bisect_right(spans, moment, key=itemgetter(0)) - 1
        if index >= 0 and moment <= spans[index][1]:
            device[spans[index][2]] += duration / 1e6
    whole = (max(end, *(stop for _, stop, _ in spans)) - spans[0][0]) / 1e6
    return PartTimes(host=host, device=device if launches else None, whole=whole)


def tabulate(times: PartTimes, flops: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return means of a step, part by part; ``flops`` has the operations of each recorded step, by part."""
    steps, seconds = len(flops), times.device or times.host
    rows = {**seconds, "rest": times.whole - sum(seconds.values()), "step": times.whole}
    work = {name: sum(step.get(name, 0.0) for step in flops) for name in rows}
    work["step"] = sum(work.values())
    parts = {
        name: {
            "milliseconds": round(1e3 * value / steps, 3),
            "share": round(value / times.whole, 4),
            "gflop": round(work[name] / steps / 1e9, 4),
            "gflops": round(work[name] / value / 1e9, 2) if value else 0.0,
        }
        for name, value in rows.items()
    }
    if times.device is not None:
        for name, value in times.host.items():
            parts[name]["host_milliseconds"] = round(1e3 * value / steps, 3)
    return parts


def format_table(table: Mapping[str, Any]) -> list[str]:
    """Return the table as text, a line a part; on a GPU times are its own, and the CPU's stand beside them."""
    text = [f"{'':<16}{'ms a step':>12}{'share':>8}{'GFLOP':>10}{'GFLOP/s':>10}"]
    for name, row in table["parts"].items():
        work = f"{row['gflop']:>10.3f}{row['gflops']:>10.1f}" if row["gflop"] else ""
        host = f"   CPU {row['host_milliseconds']:.2f} ms" if "host_milliseconds" in row else ""
        text.append(f"{name:<16}{row['milliseconds']:>12.2f}{row['share']:>8.1%}{work:<20}{host}".rstrip())
    return [*text, f"mean of {table['recorded_steps']} recorded steps, {table['device']}, {table['precision']}"]
