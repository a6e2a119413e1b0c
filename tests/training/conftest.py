"""What all tests of training need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.processes import CONTEXT, start_server
from training import side_by_side


@pytest.fixture(scope="module", autouse=True)
def _same_threads() -> Iterator[None]:
    """Runs set the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are trained side by side by processes that import nothing."""
    start_server()
    monkeypatch.setattr(side_by_side, "get_context", lambda _: CONTEXT)
