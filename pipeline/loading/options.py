"""The options of a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.options import check_section, option
from pipeline.sampling.cost import CostModel
from pipeline.sampling.groups import GROUP_EVENTS
from pipeline.sampling.policy import BUCKET_WIDTH, Policy

Truncate = Literal["earliest", "latest", "random"]


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Batches and how they are loaded.

    Attributes:
        max_cost: maximum cost of a global batch, or None; a patient who costs more is a batch alone.
        budget: what ``max_cost`` counts, by default the time of a step.
        cost: by which patients are split evenly across ranks; it must be equal on all ranks.
        pin_memory: hand out page-locked tensors, from which a GPU copies while it computes.  Only without a transform,
            which pins what it makes itself.
        verify: compare checksums of index and shards with the manifest's.

    Raises:
        UserError: a value is out of range.
    """

    batch_size: int | None = option(16, "Maximum number of patients of a global batch, over all ranks.", minimum=1)
    max_events: int | None = option(None, "Maximum number of events of a global batch, over all ranks.", minimum=1)
    max_cost: float | None = None
    budget: CostModel | None = None
    shuffle: bool = option(True, "Make new batches in a new order every epoch.")
    seed: int = option(0, "Random seed of batch order and truncation.", minimum=0)
    bucketing: bool = option(True, "Group patients with similar numbers of events, which saves padding.")
    bucket_width: float = option(BUCKET_WIDTH, "How far apart patients of a batch may be, in batches.", minimum=0)
    max_sequence_length: int | None = option(None, "Maximum number of events of a patient; others are cut.", minimum=1)
    truncate: Truncate = option("earliest", "Which events of a patient that is cut are kept.")
    cost: CostModel | None = None
    group_events: int = option(
        GROUP_EVENTS, "Split larger splits into groups of about this many events; two are in memory.", minimum=1
    )
    prefetch: int = option(2, "Number of batches that a thread prepares in advance; 0 = no thread.", minimum=0)
    pin_memory: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        check_section(self)
        _ = self.policy  # raises

    @property
    def policy(self) -> Policy:
        """How patients are grouped into global batches."""
        return Policy(
            batch_size=self.batch_size,
            max_events=self.max_events,
            max_cost=self.max_cost,
            cost=self.budget or CostModel(),
            bucketing=self.bucketing,
            bucket_width=self.bucket_width,
            shuffle=self.shuffle,
        )
