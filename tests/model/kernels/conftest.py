"""Kernels run in Triton's interpreter here: on the CPU, by numpy, with the arithmetic of float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model.kernels.ops import choose_kernels


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    pytest.importorskip("triton")
    with choose_kernels(True):
        yield
