"""Synthetic patients: seeded, vectorised, with an outcome that can be learned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.arrays import Floats, Ints
from pipeline.options import Section, option
from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.sources.listing import Listing
from pipeline.prepare.sources.reading import Piece, number_rows
from pipeline.prepare.sources.source import RawRows, Source
from pipeline.schema import LABEL, MINUTE, PATIENT_ID, VALUE, VARIABLE

NUM_VARIABLES: Final = 40
EVENTS_PER_SET: Final = 6.0
STAY_MINUTES: Final = 48 * 60
PATIENTS_PER_PIECE: Final = {"icu": 4096, "heavy": 256}
OUTCOME_RATE: Final = 0.2
CHANCE_STD: Final = 0.5
"""Standard deviation of what decides the outcome besides severity, and is not in the data."""

_VARIABLES, _OUTCOMES, _EVENTS = range(3)
"""Independent streams of random numbers."""

VARIABLES: Final = tuple(f"variable_{number:02d}" for number in range(NUM_VARIABLES))
"""The last one has no number: it only says that something was done."""


@dataclass(frozen=True, kw_only=True)
class SyntheticOptions(Section):
    """Options of --format synthetic."""

    num_patients: int = option(1000, "Number of synthetic patients.", minimum=1)
    profile: Literal["icu", "heavy"] = option("icu", "Stays of 48 hours, or histories of 500 to 50,000 events.")
    seed: int = option(0, "Random seed of all synthetic values.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source, SyntheticOptions):
    """Patients with a severity, on which half of the variables depend, the more the later in the stay.

    Some variables are recorded more often for severe patients.  The outcome is severity with noise above a threshold,
    so that no model reaches an AUROC of 1.  The profile ``icu`` has about 70 sets of 6 events a stay; the number of
    events of ``heavy`` is log-normal.
    """

    name: ClassVar[str] = "synthetic"
    unused: ClassVar[tuple[str, ...]] = ("labels", "label_column", "label_kind", "label_classes")

    path: Path = Path("synthetic")

    def list_events(self) -> Listing:
        return Listing()

    def find_events(self) -> dict[str, Path]:
        return {}

    def pieces(self) -> list[Piece]:
        step = PATIENTS_PER_PIECE[self.profile]
        starts = range(0, self.num_patients, step)
        return [Piece(files=("synthetic",), start=start, stop=min(start + step, self.num_patients)) for start in starts]

    def read(self, piece: Piece) -> Iterator[RawRows]:
        severity, _ = self._draw_outcomes(piece)
        variables = np.random.default_rng([self.seed, _VARIABLES])
        rate = variables.permutation(np.geomspace(0.9, 0.02, NUM_VARIABLES))
        rate *= EVENTS_PER_SET / rate.sum()
        mean = variables.uniform(1.0, 100.0, NUM_VARIABLES)
        effect = np.where(np.arange(NUM_VARIABLES) % 2 == 0, variables.choice([-1.0, 1.0], NUM_VARIABLES), 0.0)

        generator = np.random.default_rng([self.seed, _EVENTS, piece.start])
        num_sets, duration = self._draw_lengths(generator, len(severity))
        patient_S = np.repeat(np.arange(len(severity)), num_sets)
        minute_S = np.floor(generator.random(len(patient_S)) * duration[patient_S])
        factor_S = np.exp(0.2 * severity[patient_S], dtype=np.float32)
        recorded_SV = generator.random((len(patient_S), NUM_VARIABLES), dtype=np.float32) < rate * factor_S[:, None]
        set_E, variable_E = np.nonzero(recorded_SV)
        patient_E = patient_S[set_E]
        shift_E = severity[patient_E] * effect[variable_E] * (0.2 + 0.4 * minute_S[set_E] / duration[patient_E])
        value_E = mean[variable_E] * (1 + 0.2 * (shift_E + generator.standard_normal(len(set_E))))
        value_E[variable_E == NUM_VARIABLES - 1] = np.nan
        columns = {
            PATIENT_ID: _name_patients(piece).gather(patient_E),
            MINUTE: pl.Series(minute_S[set_E]),
            VARIABLE: pl.Series(VARIABLES).gather(variable_E),
            VALUE: pl.Series(value_E.astype(np.float32), nan_to_null=True),
        }
        yield RawRows(rows=number_rows(columns))

    def _draw_outcomes(self, piece: Piece) -> tuple[Floats, npt.NDArray[np.int8]]:
        """Return [P] severity, standard normal, and [P] outcome, 0 or 1."""
        generator = np.random.default_rng([self.seed, _OUTCOMES, piece.start])
        severity, chance = generator.standard_normal((2, piece.stop - piece.start))
        threshold = NormalDist(sigma=math.hypot(1.0, CHANCE_STD)).inv_cdf(1 - OUTCOME_RATE)
        return severity, (severity + CHANCE_STD * chance > threshold).astype(np.int8)

    def _draw_lengths(self, generator: np.random.Generator, num_patients: int) -> tuple[Ints, Floats]:
        """Return [P] number of sets and [P] duration in minutes of each patient."""
        if self.profile == "icu":
            num_sets = generator.lognormal(math.log(66.0), 0.35, num_patients).clip(5, 200)
            return num_sets.astype(np.int64), np.full(num_patients, STAY_MINUTES, dtype=np.float64)
        num_events = generator.lognormal(math.log(5000.0), 1.0, num_patients).clip(500, 50_000)
        num_sets = num_events / EVENTS_PER_SET
        return num_sets.astype(np.int64), num_sets * 600.0

    def read_labels(self, hide: Hide | None = None) -> Labels | None:
        parts = ({PATIENT_ID: _name_patients(piece), LABEL: self._draw_outcomes(piece)[1]} for piece in self.pieces())
        return Labels.of_frame(self.name, pl.concat(map(pl.DataFrame, parts)), hide=hide)


def _name_patients(piece: Piece) -> pl.Series:
    return pl.Series([f"synthetic-{number:07d}" for number in range(piece.start, piece.stop)], dtype=pl.String)
