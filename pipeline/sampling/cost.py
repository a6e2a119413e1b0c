"""The predicted cost of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Floats, Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Predicted cost of a training step, by default its time in units of the time of one event.

    The default weights are those of the reference preset, fitted to steps measured on 2 CPU cores
    (``benchmarks.growth``).  For another preset, machine or unit (such as the bytes of a step's peak) the trainer fits
    weights of its own.
    """

    event: float = 1.0
    set: float = 4.0
    set_squared: float = 0.0002  # the square of a patient's sets, which is attention's
    patient: float = 12.0
    batch: float = 0.0  # whatever is in it

    def predict(self, num_events: Ints, num_sets: Ints) -> Floats:
        """Return the cost of each patient, [P] float64; a batch costs their sum and ``batch``."""
        sets = num_sets.astype(np.float64)
        return self.event * num_events + (self.set + self.set_squared * sets) * sets + self.patient
