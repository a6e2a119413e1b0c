"""The device that the tests of this folder use, and the mark that skips them where there is none.

``GPU_TESTS_DEVICE=cpu`` rehearses them on a machine without a GPU: the tests run, the device is the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_DEVICE") or ("cuda" if torch.cuda.is_available() else "")

on_gpu = DEVICE == "cuda"


Test = TypeVar("Test", bound=Callable[..., None])


def gpu_test(function: Test) -> Test:
    """Mark a test as one that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not DEVICE, reason="no GPU here")(function))
