"""Put samples beside the rows of an index, in its order, a bounded number at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import polars as pl

from pipeline.prepare.record_sorter import Records, SortedRecords, cut_keys
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.times import MICROSECONDS
from pipeline.schema import PREDICTION_MINUTE, PREDICTION_TIME


def place_samples(labels: Labels, index: Iterable[pl.DataFrame], records: SortedRecords) -> Iterator[pl.DataFrame]:
    """Yield the samples with their patients' rows of the index, in its order, some patients at a time.

    Without prediction times every patient is a sample: one who has no label is unlabelled.

    Args:
        labels: of the task.
        index: rows of the index in order, in parts.
        records: of :class:`JoinedSamples`.
    """
    return (_place(labels, rows, own) for rows, own in _align(index, records))


def _align(index: Iterable[pl.DataFrame], records: SortedRecords) -> Iterator[tuple[pl.DataFrame, Records]]:
    """Yield rows of the index, and the records of these rows, whose ``row`` counts from the first of them."""
    ranges, held, end = cut_keys(records), np.empty(0, records.dtype), 0.0
    stop = 0
    for part in index:
        start, stop = stop, stop + part.height
        low = start
        while low < stop:
            if end <= low:  # what is held is used up
                keys = next(ranges)
                held, end = records.read(keys), math.inf if keys[1] is None else keys[1]
            high = int(min(stop, end))
            size = int(np.searchsorted(held["row"], high))
            own, held = held[:size].copy(), held[size:]
            own["row"] -= low
            yield part[low - start : high - start], own
            low = high


def _place(labels: Labels, rows: pl.DataFrame, records: Records) -> pl.DataFrame:
    times, columns = labels.samples.times, labels.to_columns(records)
    if times:
        samples = rows[records["row"]].with_columns(columns)
    else:
        position = np.full(rows.height, -1)
        position[records["row"]] = np.arange(len(records))
        (label,), at = columns, pl.Series(position)
        samples = rows.with_columns(label.gather(at.set(at < 0, None)))
    minute = pl.lit(None, pl.Float64)
    if times == "date":
        minute = (pl.col(PREDICTION_TIME) - pl.col("time_origin")).dt.total_microseconds() / MICROSECONDS
    elif times == "minute":
        minute = pl.col(PREDICTION_MINUTE)
    given = pl.col(PREDICTION_TIME) if times == "date" else pl.lit(None, pl.Datetime("us"))
    return samples.with_columns(given.alias(PREDICTION_TIME), minute.alias(PREDICTION_MINUTE))
