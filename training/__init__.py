"""What trains, evaluates and saves the model.  Names are imported when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from seqsetvae import find_hidden_package

if TYPE_CHECKING:
    from training.checkpoint import load_model

__all__ = ["load_model"]

if _hidden := find_hidden_package(("pipeline", "model")):  # a user's model.py is common where a notebook lies
    if sys.argv[0] == "-m":  # Python is still looking for the module that it was told to run
        print(f"training: {_hidden}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_hidden)


def __getattr__(name: str) -> Any:
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("training.checkpoint").load_model
