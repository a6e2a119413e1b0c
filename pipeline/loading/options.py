"""The options of a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.options import option
from pipeline.sampling.groups import GROUP_EVENTS
from pipeline.sampling.policy import Policy

Truncate = Literal["earliest", "latest", "random"]


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Policy):
    """Batches and how they are loaded; ``verify`` compares checksums of index and shards with the manifest's."""

    seed: int = option(0, "Random seed of batch order and truncation.", minimum=0)
    max_sequence_length: int | None = option(None, "Maximum number of events of a patient; others are cut.", minimum=1)
    truncate: Truncate = option("earliest", "Which events of a patient that is cut are kept.")
    group_events: int = option(GROUP_EVENTS, "Approximate number of events that are in memory at a time.", minimum=1)
    prefetch: int = option(2, "Number of batches that a thread prepares in advance; 0 = no thread.", minimum=0)
    verify: bool = True
