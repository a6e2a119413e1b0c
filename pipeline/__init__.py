"""Event tables to shards, shards to batches.  Names are imported when first used: plans need no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.loading.batch import PatientBatch
    from pipeline.loading.loader import PatientLoader, make_loader
    from pipeline.storage.remote import open_folder

__all__ = ["PatientBatch", "PatientLoader", "make_loader", "open_folder"]

_HOME = {
    "PatientBatch": "pipeline.loading.batch",
    "PatientLoader": "pipeline.loading.loader",
    "make_loader": "pipeline.loading.loader",
    "open_folder": "pipeline.storage.remote",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
