"""How patients are grouped into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.sampling.cost import CostModel
from pipeline.schema import UserError

Layout = Literal["ragged", "padded"]


Axis = Literal["events", "sets"]


BUCKET_WIDTH = 4.0
"""Batches; at 16 ICU stays a batch 1.7 % of events are padding, and one pair in seven meets again in the next epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How patients are grouped into global batches.

    Attributes:
        batch_size: most patients of a global batch (all ranks together), or None for no limit.
        max_events: most events of a global batch, or None for no limit; padding counts in the padded layout.
        layout: what ``max_events`` counts: ``ragged`` the events, ``padded`` patients times the most events of one.
        max_cost: the most that a global batch may cost, or None for no limit; a patient who costs more is a batch
            alone.
        cost: what ``max_cost`` counts: the time of a step, or the bytes of its peak.
        bucket_by: the axis along which the patients of a batch are alike; None groups at random, as a control.
        bucket_width: how far apart patients of a batch may be, in batches.  0 is plain sorting, with the least
            padding and the same batches every epoch; larger values mix more and pad more.
        shuffle: new batches in a new order every epoch; otherwise the same ones, shortest patients first.

    Raises:
        UserError: there is no limit at all, or a value is out of range.
    """

    batch_size: int | None = 16
    max_events: int | None = None
    layout: Layout = "ragged"
    max_cost: float | None = None
    cost: CostModel = CostModel()
    bucket_by: Axis | None = "events"
    bucket_width: float = BUCKET_WIDTH
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size is None and self.max_events is None and self.max_cost is None:
            raise UserError("batches have no limit: give --batch_size, --max_events or both")
        for flag, limit in (("batch_size", self.batch_size), ("max_events", self.max_events)):
            if limit is not None and limit < 1:
                raise UserError(f"--{flag} {limit}: must be at least 1")
        if self.max_cost is not None and not self.cost.batch < self.max_cost < float("inf"):
            raise UserError(
                f"a batch cannot cost {self.max_cost:g} at most: without patients it costs {self.cost.batch:g}"
            )
        if not 0 <= self.bucket_width < float("inf"):
            raise UserError(f"--bucket_width {self.bucket_width}: must be a finite number of batches, 0 or more")
        if self.layout not in ("ragged", "padded"):
            raise UserError(f"layout {self.layout!r}: must be ragged or padded")
        if self.bucket_by not in ("events", "sets", None):
            raise UserError(f"--bucket_by {self.bucket_by}: must be events or sets")

    @property
    def fixed_size(self) -> int | None:
        """Patients of every batch but one, or None where ``max_events`` or ``max_cost`` has a say."""
        return self.batch_size if self.max_events is None and self.max_cost is None else None
