"""The predicted cost of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Predicted cost of a training step, by default its time in units of one event's.

    Fitted to measured steps (``benchmarks.growth``, 2 cores): in the reference preset a set, with 16 inducing points of
    its own, takes as long as 4.3 events, a patient 12, and the square of its sets, which is attention's, 0.0002; in the
    small preset a set 0.4, a patient 28, the square of its sets 0.0005.

    Attributes:
        event, set, set_squared, patient: of each event, set, square of a patient's number of sets, and patient.
        batch: of a step whatever is in its batch.
    """

    event: float = 1.0
    set: float = 4.0
    set_squared: float = 0.0002
    patient: float = 12.0
    batch: float = 0.0

    def of(self, num_events: Lengths, num_sets: Lengths) -> npt.NDArray[np.float64]:
        """[P] float64 cost of each patient; a batch costs their sum and ``batch``."""
        sets = num_sets.astype(np.float64)
        return self.event * num_events + (self.set + self.set_squared * sets) * sets + self.patient


PEAK_BYTES = {
    "small": CostModel(event=17_375, set=30_788, set_squared=0.0, patient=179_580, batch=416_456),
    "reference": CostModel(event=77_398, set=266_684, set_squared=7.0, patient=1_073_954, batch=6_720_449),
}
"""Bytes that a training step in float32 needs at its peak, over what weights and optimiser hold, by preset of the
model; fitted by ``benchmarks.memory_model``.  ``training.memory`` fits them to a machine and a configuration."""
