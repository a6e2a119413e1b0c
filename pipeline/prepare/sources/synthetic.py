"""Made-up patients: seeded, vectorised, with an outcome that can be learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.prepare.sources.source import LABEL, Piece, RawRows, Source, number_rows
from pipeline.schema import MINUTE, PATIENT_ID, VALUE, VARIABLE

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

NUM_VARIABLES: Final = 40
EVENTS_PER_SET: Final = 6.0
STAY_MINUTES: Final = 48 * 60
PATIENTS_PER_PIECE: Final = {"icu": 4096, "heavy": 256}
OUTCOME_RATE: Final = 0.2
LUCK: Final = 0.5
"""Standard deviation of what decides the outcome beside severity, and is not in the data."""

_VARIABLES, _OUTCOMES, _EVENTS = range(3)
"""Streams of random numbers that do not touch."""

VARIABLES: Final = tuple(f"variable_{number:02d}" for number in range(NUM_VARIABLES))
"""The last has no number: it only says that something was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthetic(Source):
    """``num_patients`` patients.

    Each has a severity; half of the variables shift with it, the more the later in the stay, and some are recorded more
    often.  The outcome is severity with noise above a threshold, so that no model reaches an AUROC of 1.

    Attributes:
        profile: ``icu``: 48 hours, about 70 sets of 6 events; ``heavy``: histories of 500 to 50,000 events, log-normal.
        seed: of all random numbers.
    """

    num_patients: int = 1000
    profile: Literal["icu", "heavy"] = "icu"
    seed: int = 0
    embeddings_file: Path | None = None
    name: str = "synthetic"

    @property
    def options(self) -> dict[str, object]:
        return {"num_patients": self.num_patients, "profile": self.profile, "seed": self.seed}

    def inputs(self) -> list[Path]:
        return [] if self.embeddings_file is None else [self.embeddings_file]

    def pieces(self) -> list[Piece]:
        step = PATIENTS_PER_PIECE[self.profile]
        starts = range(0, self.num_patients, step)
        return [Piece(files=("synthetic",), start=start, stop=min(start + step, self.num_patients)) for start in starts]

    def read(self, piece: Piece) -> RawRows:
        severity, _ = self._outcomes(piece)
        variables = np.random.default_rng([self.seed, _VARIABLES])
        rate = variables.permutation(np.geomspace(0.9, 0.02, NUM_VARIABLES))
        rate *= EVENTS_PER_SET / rate.sum()
        mean = variables.uniform(1.0, 100.0, NUM_VARIABLES)
        effect = np.where(np.arange(NUM_VARIABLES) % 2 == 0, variables.choice([-1.0, 1.0], NUM_VARIABLES), 0.0)

        generator = np.random.default_rng([self.seed, _EVENTS, piece.start])
        num_sets, duration = self._lengths(generator, len(severity))
        patient_S = np.repeat(np.arange(len(severity)), num_sets)
        minute_S = np.floor(generator.random(len(patient_S)) * duration[patient_S])
        often_S = np.exp(0.2 * severity[patient_S], dtype=np.float32)
        recorded_SV = generator.random((len(patient_S), NUM_VARIABLES), dtype=np.float32) < rate * often_S[:, None]
        set_E, variable_E = np.nonzero(recorded_SV)
        patient_E = patient_S[set_E]
        shift_E = severity[patient_E] * effect[variable_E] * (0.2 + 0.4 * minute_S[set_E] / duration[patient_E])
        value_E = mean[variable_E] * (1 + 0.2 * (shift_E + generator.standard_normal(len(set_E))))
        value_E[variable_E == NUM_VARIABLES - 1] = np.nan
        return RawRows(
            rows=number_rows(
                {
                    PATIENT_ID: self._patients(piece).gather(patient_E),
                    MINUTE: pl.Series(MINUTE, minute_S[set_E]),
                    VARIABLE: pl.Series(VARIABLE, VARIABLES).gather(variable_E),
                    VALUE: pl.Series(VALUE, value_E.astype(np.float32), nan_to_null=True),
                }
            )
        )

    def _outcomes(self, piece: Piece) -> tuple[FloatArray, FloatArray]:
        """[P] severity, standard normal, and [P] outcome, 0 or 1."""
        generator = np.random.default_rng([self.seed, _OUTCOMES, piece.start])
        severity, luck = generator.standard_normal((2, piece.stop - piece.start))
        threshold = NormalDist(sigma=math.hypot(1.0, LUCK)).inv_cdf(1 - OUTCOME_RATE)
        return severity, (severity + LUCK * luck > threshold).astype(np.float64)

    def _lengths(self, generator: np.random.Generator, num_patients: int) -> tuple[IntArray, FloatArray]:
        """[P] sets and [P] minutes of each patient."""
        if self.profile == "icu":
            num_sets = generator.lognormal(math.log(66.0), 0.35, num_patients).clip(5, 200)
            return num_sets.astype(np.int64), np.full(num_patients, STAY_MINUTES, dtype=np.float64)
        num_events = generator.lognormal(math.log(5000.0), 1.0, num_patients).clip(500, 50_000)
        num_sets = num_events / EVENTS_PER_SET
        return num_sets.astype(np.int64), num_sets * 600.0

    @staticmethod
    def _patients(piece: Piece) -> pl.Series:
        return pl.Series(
            PATIENT_ID, [f"synthetic-{number:07d}" for number in range(piece.start, piece.stop)], dtype=pl.String
        )

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        labels = pl.concat(
            pl.DataFrame({PATIENT_ID: self._patients(piece), LABEL: pl.Series(self._outcomes(piece)[1]).cast(pl.Int8)})
            for piece in self.pieces()
        )
        return self.name, labels

    def embeddings(self) -> Path | None:
        return self.embeddings_file
