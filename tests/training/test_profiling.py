"""Where time goes: by hand from made-up events, and of real steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from model.losses import LossOptions
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from tests.model.helpers import random_batch, tiny_model
from training.profiling import PARTS, PartTimes, StepProfiler, count_flops, format_table, tabulate, time_parts


def event(name: str, start: float, end: float, *kernels: float, on: DeviceType = DeviceType.CPU) -> Any:
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=on,
        kernels=[SimpleNamespace(duration=duration) for duration in kernels],
        is_user_annotation=name in PARTS,
    )


LABELS = [event("encoder", 10, 30), event("backward", 50, 90), event("encoder", 110, 130), event("backward", 140, 200)]


def test_on_a_cpu_a_part_takes_the_time_between_its_ends() -> None:
    times = time_parts([event("aten::mm", 11, 19), *reversed(LABELS)])
    assert times.device is None
    assert times.host["encoder"] == pytest.approx(40e-6)
    assert times.host["backward"] == pytest.approx(100e-6)
    assert times.host["head"] == 0
    assert times.whole == pytest.approx(190e-6)


def test_only_several_devices_wait_for_one_another() -> None:
    assert "communication" not in time_parts(LABELS).host
    times = time_parts([*LABELS, event("communication", 91, 96)])
    assert times.host["communication"] == pytest.approx(5e-6)


def test_on_a_gpu_a_part_takes_its_kernels_whoever_launched_them_and_whenever_they_ran() -> None:
    gpu = DeviceType.CUDA
    events = [
        *LABELS,
        event("encoder", 10, 30, 500.0),  # as an annotation has the sum of what is in it
        event("aten::mm", 12, 13, 70.0, 5.0),
        event("MmBackward0", 60, 70, 90.0),
        event("aten::add", 40, 41, 1000.0),  # in no part
        event("gemm", 100, 290, on=gpu),
    ]
    times = time_parts(events[1:])
    assert times.device is not None
    assert times.device["encoder"] == pytest.approx(75e-6)
    assert times.device["backward"] == pytest.approx(90e-6)
    assert times.whole == pytest.approx(280e-6), "until the last kernel is done"


def test_table_by_hand() -> None:
    host = {**dict.fromkeys(PARTS, 0.0), "encoder": 0.2, "backward": 0.6}
    parts = tabulate(PartTimes(host=host, device=None, whole=1.0), [{"encoder": 1e9, "backward": 2e9}] * 2)
    assert parts["encoder"] == {"milliseconds": 100.0, "share": 0.2, "gflop": 1.0, "gflops": 10.0}
    assert parts["rest"] == {"milliseconds": 100.0, "share": 0.2, "gflop": 0.0, "gflops": 0.0}
    assert parts["step"] == {"milliseconds": 500.0, "share": 1.0, "gflop": 3.0, "gflops": 6.0}


def run_steps(path: Path, model: SeqSetVAE, steps: int, done: int) -> StepProfiler:
    batch = PreparedBatch.build(random_batch([[1, 3], [2]]))
    with StepProfiler(path, model.eval(), LossOptions(), torch.float32, steps=steps) as profiler:
        for _ in range(done):
            model(batch).logits[0].sum().backward()
            profiler.step([batch])
    return profiler


@pytest.mark.parametrize(("steps", "recorded"), [(2, 1), (9, 5), (40, 5)])
def test_steps_are_recorded(tmp_path: Path, steps: int, recorded: int) -> None:
    table = run_steps(tmp_path / "trace.json.gz", tiny_model(), steps, min(steps, 20)).table
    assert table is not None
    assert table["recorded_steps"] == recorded
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [entry["name"] for entry in json.load(file)["traceEvents"]]
    assert names.count("encoder") == names.count("head") == recorded
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json.gz"}
    assert len(format_table(table)) == 1 + len(PARTS) + 2 + 1
    assert 0 < table["parts"]["encoder"]["milliseconds"] < table["parts"]["step"]["milliseconds"]


def test_a_run_that_ends_early_leaves_no_trace(tmp_path: Path) -> None:
    assert run_steps(tmp_path / "trace.json.gz", tiny_model(), 40, 12).table is None
    assert not list(tmp_path.iterdir())


def test_one_step_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--profile"):
        run_steps(tmp_path / "trace.json.gz", tiny_model(), 1, 0)


def test_operations_of_a_step_are_counted_by_part_and_by_hand() -> None:
    """The decoder's last layer alone takes 2 · rows · width² operations; backward about twice the forward pass."""
    model, batch = tiny_model(), random_batch([[4, 4], [4]])
    prepared = PreparedBatch.build(batch, seed=0)
    joint, supervised = (count_flops(model, prepared, LossOptions(objective=name)) for name in ("joint", "supervised"))
    assert joint["decoder"] > 2 * 12 * model.config.width**2
    assert supervised["decoder"] == 0
    assert supervised["encoder"] == joint["encoder"] > 0
    forward = sum(flops for name, flops in joint.items() if name != "backward")
    assert forward < joint["backward"] <= 2.5 * forward
