"""Count the samples of a task, which come in parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import polars as pl

from pipeline.arrays import Ints, find_runs, harden, offsets_from_sizes
from pipeline.dataset.tasks import SampleCounts
from pipeline.prepare.sources.labels import Labels
from pipeline.schema import LABEL, PATIENT_ID, SPLITS

SLICE_ROWS: Final = 1 << 19
"""Maximum number of samples whose moments are computed at once, unless one patient has more."""


class SampleCounter:
    """Counts the samples of each split.

    Moments are those of slices, merged, and the slices follow from the numbers of samples of patients alone: however
    the samples are cut into parts, the counts are the same to the bit.
    """

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._parts: dict[str, list[SampleCounts]] = {split: [] for split in SPLITS}
        self._held: list[pl.DataFrame] = []
        self._sizes = np.zeros(0, np.int64)  # of the patients of held samples

    def add(self, samples: pl.DataFrame) -> None:
        """Count samples; those of a patient come together, and in one part."""
        patient = samples[PATIENT_ID].rle_id() + len(self._sizes)
        self._held.append(samples.select("split", LABEL, "num_events", patient.alias("patient")))
        self._sizes = np.append(self._sizes, np.unique(patient, return_counts=True)[1])
        if self._sizes.sum() > SLICE_ROWS:
            *whole, (low, _) = cut_ranges(self._sizes, SLICE_ROWS)
            offsets, held = offsets_from_sizes(self._sizes), pl.concat(self._held)
            for first, last in whole:
                self._count(held[offsets[first] : offsets[last]])
            self._sizes = self._sizes[low:]
            self._held = [held[offsets[low] :].with_columns(pl.col("patient") - low)]

    def finish(self) -> dict[str, SampleCounts]:
        """Return the counts of all samples by split."""
        if len(self._sizes):
            self._count(pl.concat(self._held))
        return {
            split: _add_counts(parts) if parts else SampleCounts(class_counts=[0] * len(self._labels.classes))
            for split, parts in self._parts.items()
        }

    def _count(self, samples: pl.DataFrame) -> None:
        for split, parts in self._parts.items():
            own = samples.filter(split=split)
            if own.height:
                parts.append(_count_samples(own, self._labels))


def _count_samples(samples: pl.DataFrame, labels: Labels) -> SampleCounts:
    """Count samples of a split."""
    label = samples[LABEL].drop_nulls()
    is_number = labels.kind == "regression" and len(label) > 0
    of_class = harden(label.to_numpy()).astype(np.int64) if labels.classes else np.zeros(0, np.int64)
    return SampleCounts(
        num_samples=samples.height,
        num_patients=len(find_runs(samples["patient"].to_numpy())),
        num_labelled=len(label),
        num_without_events=int((samples["num_events"] == 0).sum()),
        class_counts=np.bincount(of_class, minlength=len(labels.classes)).tolist(),
        mean=float(np.mean(label.to_numpy())) if is_number else None,
        std=float(np.std(label.to_numpy())) if is_number else None,
    )


def _add_counts(parts: Sequence[SampleCounts]) -> SampleCounts:
    """Return the counts of samples of different patients together, with merged moments."""
    if len(parts) == 1:
        return parts[0]
    numbers = ("num_samples", "num_patients", "num_labelled", "num_without_events")
    total = SampleCounts(
        **{name: sum(getattr(part, name) for part in parts) for name in numbers},
        class_counts=[sum(counts) for counts in zip(*(part.class_counts for part in parts), strict=True)],
    )
    moments = np.array([(part.num_labelled, part.mean, part.std) for part in parts if part.mean is not None])
    if not len(moments):
        return total
    number, mean, std = moments.T
    merged = float(np.average(mean, weights=number))
    spread = float(np.average(std**2 + (mean - merged) ** 2, weights=number))
    return replace(total, mean=merged, std=math.sqrt(spread))


def cut_ranges(sizes: Ints, max_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges (low, high) of parts that have at most ``max_rows`` together, or are one part."""
    offsets = offsets_from_sizes(sizes)
    low = 0
    while low < len(sizes):
        high = max(low + 1, int(np.searchsorted(offsets, offsets[low] + max_rows, side="right")) - 1)
        yield low, high
        low = high
