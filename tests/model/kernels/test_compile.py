from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MAX_SHARED = 100_000
"""Bytes of shared memory that a program of the smallest of these GPUs may have."""

MAX_SPILLED = 16
"""Bytes a thread.  Four registers at most, around the largest products of distances and of half precision."""


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("preset", ["small", "reference"])
def test_kernels_fit_the_chip_without_spills(preset: str, architecture: int) -> None:
    """In a process of its own, in which Triton compiles instead of interpreting."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.model.kernels.compile", preset, str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {kernel["dtype"] for kernel in found} == {"fp32", "bf16", "fp16"}
    assert [kernel for kernel in found if kernel["shared"] > MAX_SHARED or kernel["spilled"] > MAX_SPILLED] == []
