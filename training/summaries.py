"""Many summaries of each variable of a sample, such as trees and linear models are given; in raw units, so that they
do not depend on a split.

Of each variable: mean, least, greatest, first, last, standard deviation, count, hours since first and since last, a
recent mean (half as heavy every six hours), slope, and mean, least, greatest, last and count of the last 12 hours of
48 and of the first 24; and a few ratios and changes that are known in intensive care.  NaN = never recorded.

Shape suffixes: B samples, F summaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.loading.batch import PatientBatch
from pipeline.schema import FIRST_CODE

Floats = npt.NDArray[np.float64]

HALF_LIFE_HOURS = 6.0
WINDOWS = {"last 12 h": (36.0, 48.0), "first 24 h": (0.0, 24.0)}
WHOLE = ("mean", "least", "greatest", "first", "last", "std", "count", "since first", "since last", "recent", "slope")
PART = ("mean", "least", "greatest", "last", "count")
RATIOS = (("PaO2", "FiO2"), ("HR", "SysABP"), ("BUN", "Creatinine"), ("Urine", "Weight"))
CHANGES = ("GCS", "Lactate")

MAX_VARIABLES = 64
"""Most variables that are summarised: those with most events in the train split."""


class Summaries:
    """Summaries of the variables of a vocabulary; ``names`` [F] says what each is."""

    def __init__(self, vocabulary: pa.Table) -> None:
        codes = most_frequent(vocabulary, MAX_VARIABLES)
        self._mean, self._std = (vocabulary[name].to_numpy() for name in ("mean", "std"))
        self._row = np.full(vocabulary.num_rows, -1)
        self._row[codes] = np.arange(len(codes))
        self._variables = vocabulary["variable"].take(codes).to_pylist()
        columns = [*WHOLE, *(f"{window}, {what}" for window in WINDOWS for what in PART)]
        self._num_columns = len(columns)
        self.names = [f"{name}, {what}" for name in self._variables for what in columns]
        self.names += [f"{a} / {b}" for a, b in RATIOS] + [f"change of {name}" for name in CHANGES] + ["events"]

    def of_batch(self, batch: PatientBatch) -> Floats:
        """Return the summaries [B, F] of the patients of a batch."""
        hours = batch.minute.double().numpy()[batch.set_of_event.numpy()] / 60
        code = batch.code.numpy()
        raw = batch.value.double().numpy() * self._std[code] + self._mean[code]
        is_number, bounds = batch.has_value.numpy(), batch.set_offsets[batch.patient_offsets].tolist()
        rows = np.empty((batch.num_patients, len(self.names)))
        for number in range(batch.num_patients):
            own = slice(bounds[number], bounds[number + 1])
            used = is_number[own]
            rows[number] = self._summarize(self._row[code[own][used]], raw[own][used], hours[own][used])
        return rows

    def _summarize(self, row: npt.NDArray[Any], value: Floats, hours: Floats) -> Floats:
        """Return the summaries [F] of the numbers of one sample; ``row`` is their variable, or -1."""
        table = np.full((len(self._variables), self._num_columns), np.nan)
        table[:, WHOLE.index("count")] = 0
        end = hours.max(initial=0.0)
        for variable in np.unique(row[row >= 0]):
            own = row == variable
            v, h = value[own], hours[own]
            weight = 0.5 ** ((end - h) / HALF_LIFE_HOURS)
            slope = np.polyfit(h, v, 1)[0] if np.ptp(h) > 0 else 0.0
            whole = [v.mean(), v.min(), v.max(), v[0], v[-1], v.std(), len(v), end - h[0], end - h[-1]]
            parts = [list(_summarize_part(v[(h >= start) & (h <= stop)])) for start, stop in WINDOWS.values()]
            table[variable] = [*whole, weight @ v / max(weight.sum(), 1e-12), slope, *parts[0], *parts[1]]
        of, nothing = dict(zip(self._variables, table, strict=True)), np.full(self._num_columns, np.nan)

        def at(name: str, what: str) -> float:
            return float(of.get(name, nothing)[WHOLE.index(what)])

        ratios = [at(a, "mean") / at(b, "mean") if at(b, "mean") else np.nan for a, b in RATIOS]
        changes = [at(name, "last") - at(name, "first") for name in CHANGES]
        return np.array([*table.ravel(), *ratios, *changes, len(row)])


def most_frequent(vocabulary: pa.Table, number: int) -> npt.NDArray[np.int64]:
    """Return the codes, ascending, of so many variables: those with most events in the train split."""
    count = vocabulary["count"].to_numpy()[FIRST_CODE:]
    return FIRST_CODE + np.sort(np.argsort(-count, kind="stable")[:number])


def _summarize_part(value: Floats) -> Iterator[float]:
    if len(value):
        yield from (value.mean(), value.min(), value.max(), value[-1])
    else:
        yield from [np.nan] * 4
    yield len(value)
