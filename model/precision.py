"""Where the model computes in float32 whatever the precision of the products around it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast on ``device``, which may be one that has none, such as ``meta``."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
