"""A step hands few operations to a GPU, and asks it for nothing: on ``meta`` there is nothing to be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks.launches import LaunchCounter, count_bytes, count_launches
from benchmarks.synthetic import write_synthetic_data

MAX_LAUNCHES = 590
"""Operations of a step that are neither views nor allocations; more has to be asked for here."""


def test_views_and_allocations_are_no_launches() -> None:
    x = torch.ones(4, 4, device="meta")
    with LaunchCounter() as counter:
        x.view(16)[2:].add(torch.empty_like(x).view(16)[2:]).mul_(2)
    assert dict(counter.counts) == {("", "add"): 1, ("", "mul_"): 1}


@pytest.mark.parametrize("preset", ["small", "reference"])
def test_a_step_has_few_launches_whatever_the_batch(preset: Literal["small", "reference"], tmp_path: Path) -> None:
    data = write_synthetic_data(tmp_path / "data", num_patients=40, sets=12)
    few, many = (count_launches(data, preset, size).counts.total() for size in (4, 24))
    assert few <= many <= few + 5
    assert many <= MAX_LAUNCHES


def test_few_of_the_bytes_of_a_step_are_events(tmp_path: Path) -> None:
    """Shards on the device would save so little of the copy (docs/gpu.md)."""
    counts = count_bytes(write_synthetic_data(tmp_path / "data", num_patients=40, sets=12), 24)
    assert counts["copied_bytes_of_events"] == pytest.approx(counts["events"] * (8 + 4 + 1 + 4 + 1), rel=0.01)
    assert counts["copied_bytes_of_events"] < 0.13 * counts["copied_bytes"]
