"""How far a run has come: the counters of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; plain numbers, the same on every rank.

    Attributes:
        epochs_validated: epochs whose validation is done; one less than the epochs done while it is still to come.

        collapsed: whether the posterior had collapsed at the last validation.
        seconds: wall time spent, over all resumed parts of the run.
        threads: of each process's CPU operations, as the run began with.
        totals: throughput of all steps so far, of all ranks, as a dictionary.
        interval: throughput since the last line of the log, of all ranks, as a dictionary.
        loss_sums: sums of losses since then, of all ranks; empty = none.
    """

    step: int = 0
    epochs_validated: int = 0
    epochs_since_best: int = 0
    collapsed: bool = False
    seconds: float = 0.0
    threads: int = 0
    peak_rss_bytes: int = 0
    totals: dict[str, Any] = field(default_factory=dict)
    interval: dict[str, Any] = field(default_factory=dict)
    loss_sums: dict[str, float] = field(default_factory=dict)
