"""How patients are grouped into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pipeline.sampling.cost import CostModel
from pipeline.schema import UserError

BUCKET_WIDTH: Final = 4.0
"""Batches.  With 16 ICU stays a batch, 1.7 % of events are padding and one pair in seven meets again in the next epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How patients are grouped into global batches.

    Attributes:
        batch_size: maximum number of patients of a global batch (all ranks together), or None for no limit.
        max_events: maximum number of events of a global batch, or None for no limit.
        max_cost: maximum cost of a global batch, or None for no limit; a patient who costs more is a batch alone.
        cost: what ``max_cost`` counts: the time of a step, or the bytes of its peak.
        bucketing: group patients with similar numbers of events; otherwise at random, as a control.
        bucket_width: how far apart patients of a batch may be, in batches.  0 is plain sorting, with the least
            padding and the same batches every epoch; larger values mix more and pad more.
        shuffle: new batches in a new order every epoch; otherwise the same ones, shortest patients first.

    Raises:
        UserError: there is no limit at all, or a value is out of range.
    """

    batch_size: int | None = 16
    max_events: int | None = None
    max_cost: float | None = None
    cost: CostModel = CostModel()
    bucketing: bool = True
    bucket_width: float = BUCKET_WIDTH
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size is None and self.max_events is None and self.max_cost is None:
            raise UserError("batches have no limit: give --batch_size, --max_events or both")
        for flag, limit in (("batch_size", self.batch_size), ("max_events", self.max_events)):
            if limit is not None and limit < 1:
                raise UserError(f"--{flag} {limit}: must be at least 1")
        if self.max_cost is not None and not self.cost.batch < self.max_cost < float("inf"):
            without = f"without patients it costs {self.cost.batch:g}"
            raise UserError(f"a batch cannot cost {self.max_cost:g} at most: {without}")
        if not 0 <= self.bucket_width < float("inf"):
            raise UserError(f"--bucket_width {self.bucket_width}: must be a finite number of batches, 0 or more")

    @property
    def fixed_size(self) -> int | None:
        """Patients of every batch but one, or None if ``max_events`` or ``max_cost`` limits batches too."""
        return self.batch_size if self.max_events is None and self.max_cost is None else None
