"""Sort a partition: drop duplicates, apply the rules that need a patient's rows together, and make sets."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pipeline.arrays import find_runs
from pipeline.dataset.lists import to_lists
from pipeline.prepare.arrow_files import write_parquet, write_table
from pipeline.prepare.clean import DUPLICATE, NO_ORIGIN, REJECTS_SCHEMA
from pipeline.prepare.event_filter import EventFilter, equals_previous
from pipeline.prepare.gather import MEASURED, MOMENTS, locate
from pipeline.prepare.known_splits import Known, assign_known_splits, read_known_splits
from pipeline.prepare.moments import Moments
from pipeline.prepare.order import sort_order
from pipeline.prepare.rules import Limits, Rules
from pipeline.prepare.sources.reading import SPLIT
from pipeline.prepare.sources.source import Origin
from pipeline.prepare.spill_files import STATIC_INSTANT, PartitionRows, read_partition
from pipeline.prepare.splits import SplitRule
from pipeline.prepare.times import MICROSECONDS
from pipeline.schema import PATIENT_ID, SPLITS

SPILL_LIST: Final = "spills.json"
LIMITS: Final = "limits.json"
"""Files in the work folder of what all partitions need: the names of spills, and outlier limits [low, high] by name."""

MAX_NAMED_PATIENTS: Final = 100
"""Maximum number of patients without events that the summary names."""

NEVER: Final = np.iinfo(np.int64).max
NO_TIME: Final = np.iinfo(np.int64).min
"""Instants in microseconds that are later than all, and that NumPy takes for none."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One of the ranges of hashes into which all spills are cut, and how its events are placed in time and splits.

    The paths of the spills, below ``work``, are in ``SPILL_LIST``.
    """

    work: Path
    number: int
    num_partitions: int
    split_rule: SplitRule
    origin: Origin

    def read(self) -> tuple[PartitionRows, pl.DataFrame, EventFilter]:
        """Return the rows, ``patient_id``, ``split``, ``by_hash`` and ``time_origin`` of the patients, and the events.

        Events are in the order of sets, variables, values and minutes, without duplicates.
        """
        paths = [self.work / name for name in json.loads((self.work / SPILL_LIST).read_bytes())]
        rows = read_partition(paths, self.number, self.num_partitions)
        known = read_known_splits(self.work, self.number, self.num_partitions)
        events, origins = _sort_events(rows, self.origin)
        events.drop(DUPLICATE, equals_previous(events.kept, ["patient", "set", "variable", "value", "minute"]))
        patients = _describe_patients(rows.patient_ids, known, self.split_rule)
        no_origins = np.full(patients.height, NO_TIME)
        instants = (no_origins if origins is None else origins).view("datetime64[us]")
        return rows, patients.with_columns(time_origin=pl.Series(instants)), events


@dataclass(frozen=True, slots=True)
class SortedPartition:
    """Counts of a sorted partition."""

    num_events: int  # kept, of all splits
    num_without_events: int  # patients that have no kept row, and are not written
    without_events: list[str]  # the first of them, by name
    num_split_by_hash: int  # patients to whom the input gives no split
    num_clipped: int  # values that a rule changed
    rejects: dict[str, int]  # rows of the spills that are not kept, by reason


@dataclass(frozen=True, slots=True)
class MeasuredPartition:
    """Number of events without duplicates, of all splits."""

    num_events: int


def measure_partition(partition: Partition) -> MeasuredPartition:
    """Write the moments without duplicates, from which outlier limits are computed, to ``measured/``."""
    rows, patients, events = partition.read()
    _measure(rows, patients, events).save(locate(partition.work, MEASURED, partition.number))
    return MeasuredPartition(events.kept.height)


def sort_partition(partition: Partition, rules: Rules) -> SortedPartition:
    """Sort a partition and apply the rules; write ``sorted/<partition>.arrow``, ``late_rejects/`` and ``moments/``.

    The sorted file holds the shards of all splits before codes are known: ``code`` is a position among the variables
    named in its metadata, and ``value`` is not scaled.
    """
    rows, patients, events = partition.read()
    limits: Limits = json.loads((partition.work / LIMITS).read_bytes())
    if limits:
        events.limit(rows.variables, limits, rules.outlier_action)
    if rules.aggregate != "none":
        events.aggregate(rules.aggregate)
    if rules.min_events > 1:
        events.drop_short(rules.min_events)
    rejects = _tabulate_rejects(rows, events.rejected)
    path = partition.work / "late_rejects" / f"{partition.number:05d}.parquet"
    write_parquet(path, REJECTS_SCHEMA, [rejects], is_synced=False)
    table, present = _tabulate_patients(patients, events.kept)
    table = table.replace_schema_metadata({"variables": json.dumps(rows.variables)})
    write_table(partition.work / "sorted" / f"{partition.number:05d}.arrow", table)
    _measure(rows, patients, events).save(locate(partition.work, MOMENTS, partition.number))
    without_events = np.delete(patients[PATIENT_ID].to_numpy(), present).tolist()  # by name, as patients are
    return SortedPartition(
        num_events=events.kept.height,
        num_without_events=len(without_events),
        without_events=without_events[:MAX_NAMED_PATIENTS],
        num_split_by_hash=int(patients["by_hash"].sum()),
        num_clipped=events.num_clipped,
        rejects={reason: rejected.height for reason, rejected in events.rejected.items()},
    )


def _tabulate_patients(patients: pl.DataFrame, events: pl.DataFrame) -> tuple[pa.Table, npt.NDArray[Any]]:
    """Return a row a patient in shard order, and the positions in ``patients`` of those that have events."""
    set_start = np.flatnonzero(~equals_previous(events, ["patient", "set"]))
    set_size = np.diff(set_start, append=events.height).astype(np.int32)
    set_minute = np.minimum.reduceat(events["minute"].to_numpy(), set_start)
    events, is_spread = _sort_sets_by_minute(events, set_start, set_size, set_minute)
    patient, variable, value, minute = (events[name].to_numpy() for name in ("patient", "variable", "value", "minute"))
    patient_start = find_runs(patient[set_start])
    num_sets = np.diff(patient_start, append=len(set_start)).astype(np.int32)
    present = patient[set_start][patient_start]
    num_events = np.bincount(patient, minlength=patients.height)[present].astype(np.int32)
    has_minutes = np.logical_or.reduceat(is_spread, patient_start)
    event_minute = minute[np.repeat(has_minutes, num_events)]
    columns = {
        **{name: patients[name].gather(present).to_arrow() for name in (PATIENT_ID, "time_origin")},
        "num_events": num_events,
        "num_sets": num_sets,
        "minute": to_lists(num_sets, np.where(np.isneginf(set_minute), np.nan, set_minute)),
        "set_size": to_lists(num_sets, set_size),
        "code": to_lists(num_events, variable),
        "value": to_lists(num_events, value),
        "event_minute": to_lists(
            np.where(has_minutes, num_events, 0),
            np.where(np.isneginf(event_minute), np.nan, event_minute),
            ~has_minutes,
        ),
        "max_set_size": np.maximum.reduceat(set_size, patient_start),
        "split_number": patients[SPLIT].to_numpy()[present],
    }
    # Names are in order, so their positions are.
    return pa.table(columns).take(np.lexsort((present, num_sets, num_events))), present


def _sort_sets_by_minute(
    events: pl.DataFrame,
    set_start: npt.NDArray[np.int64],
    set_size: npt.NDArray[np.int32],
    set_minute: npt.NDArray[np.float64],
) -> tuple[pl.DataFrame, npt.NDArray[np.bool_]]:
    """Return the events with those of each set in the order of their minutes, and [S] whether a set has several.

    So the events up to any time are a run from the patient's first on.  ``minute`` becomes that of the last of merged
    events.
    """
    if "last_minute" in events.columns:
        events = events.with_columns(minute=pl.col("last_minute"))
    minute = events["minute"].to_numpy()
    is_spread = np.maximum.reduceat(minute, set_start) > set_minute
    if is_spread.any():
        rows = np.flatnonzero(np.repeat(is_spread, set_size))
        set_number = np.repeat(np.arange(len(set_size)), set_size)[rows]
        order = np.arange(events.height)
        order[rows] = rows[np.lexsort((minute[rows], set_number))]
        events = events[order]
    return events, is_spread


def _measure(rows: PartitionRows, patients: pl.DataFrame, events: EventFilter) -> Moments:
    in_train = (patients[SPLIT] == SPLITS.index("train")).to_numpy()[events.kept["patient"].to_numpy()]
    variable, value = (events.kept[name].to_numpy() for name in ("variable", "value"))
    return Moments.measure(rows.variables, variable, value, in_train)


def _sort_events(rows: PartitionRows, origin: Origin) -> tuple[EventFilter, npt.NDArray[np.int64] | None]:
    """Return ``patient``, ``set``, ``variable``, ``value``, ``minute``, ``position`` in order, and origins [P].

    Sets stand in the order of their minimum minute, then of ``set_index``; events of a set in the order of variable,
    value (null last) and minute; equal events as they came.  Static events come first: their minute is minus infinity.
    Origins are microseconds since 1970, NO_TIME where a patient has none; None where the input has minutes.
    """
    minute, value, origins = rows.minute, rows.value, None
    if minute.dtype == np.int64:
        minute, origins = _count_minutes(minute, rows, origin)
    has_index = rows.set_index is not None
    set_ = np.floor(minute) if rows.set_index is None else rows.set_index
    columns = {"patient": rows.patient, "set": set_, "variable": rows.variable, "value": value, "minute": minute}
    has_no_origin = np.isnan(minute)
    if not has_index and not has_no_origin.any():
        order = sort_order((rows.patient, set_, rows.variable), (value, minute))
        in_order = {name: column.take(order) for name, column in columns.items()}
        return EventFilter(pl.DataFrame({"position": order.astype(np.uint32), **in_order})), origins
    events = EventFilter(pl.DataFrame(columns).with_row_index("position"))
    events.drop(NO_ORIGIN, has_no_origin)
    if has_index:
        keys = ["patient", "first", "set", "variable", "value", "minute"]
        kept = events.kept.with_columns(first=pl.col("minute").min().over("patient", "set"))
        events.kept = kept.sort(keys, maintain_order=True).drop("first")
    else:
        patient, set_, variable, value, minute = (events.kept[name].to_numpy() for name in columns)
        events.kept = events.kept[sort_order((patient, set_, variable), (value, minute))]
    return events, origins


def _count_minutes(
    instant: npt.NDArray[np.int64], rows: PartitionRows, origin: Origin
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return [E] minutes since the patient's origin, and the origins [P], which are ``NO_TIME`` where there is none.

    Minutes are NaN of patients without an origin, and minus infinity of static events.

    The origin is the patient's first event that may be one; without a named variable it may be the first of all.
    """
    start = find_runs(rows.patient)
    patient = rows.patient[start]  # of each run of rows of one patient
    is_timed = instant != STATIC_INSTANT
    may_be = origin.may_be(rows.variables)
    may_be_origin = is_timed if may_be.all() else is_timed & may_be[rows.variable]

    def find_first(which: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        candidate = instant if which.all() else np.where(which, instant, NEVER)
        first = np.full(len(rows.patient_ids), NEVER)
        np.minimum.at(first, patient, np.minimum.reduceat(candidate, start))
        return first

    first = find_first(may_be_origin)
    if origin.variable is None and (first[patient] == NEVER).any():
        first = np.where(first == NEVER, find_first(is_timed), first)
    zero = np.repeat(first[patient], np.diff(start, append=len(instant)))
    minute = (instant - zero) / MICROSECONDS
    if (first[patient] == NEVER).any():
        minute[zero == NEVER] = np.nan
    if not is_timed.all():
        minute = np.where(is_timed, minute, -math.inf)
    return minute, np.where(first == NEVER, NO_TIME, first)


def _describe_patients(patient_ids: list[str], known: Known, rule: SplitRule) -> pl.DataFrame:
    """Return ``patient_id``, ``split`` (position in ``SPLITS``) and ``by_hash``, in order."""
    split, by_hash = assign_known_splits(patient_ids, known, rule)
    patients = pl.Series(PATIENT_ID, patient_ids, dtype=pl.String)
    return pl.DataFrame([patients, pl.Series(SPLIT, split, dtype=pl.Int8), pl.Series("by_hash", by_hash)])


def _tabulate_rejects(rows: PartitionRows, rejected: dict[str, pl.DataFrame]) -> pa.Table:
    """Return rejected rows in canonical form: they have passed all tests of ``clean``, and their text is gone."""
    tables = [REJECTS_SCHEMA.empty_table()]
    for reason, events in rejected.items():
        position = events["position"].to_numpy().astype(np.int64)
        file, row = rows.find_sources(position)
        table = {
            "reason": pa.repeat(pa.scalar(reason), events.height),
            "file": file,
            "row": row,
            "patient_id": pa.array(rows.patient_ids, pa.string()).take(events["patient"].to_arrow()),
            "minute": events["minute"].fill_nan(None).replace(-math.inf, None).to_arrow().cast(pa.string()),
            "variable": pa.array(rows.variables, pa.string()).take(events["variable"].to_arrow()),
            "value": pa.array(rows.value[position], from_pandas=True).cast(pa.string()),
        }
        tables.append(pa.table(table).cast(REJECTS_SCHEMA))
    return pa.concat_tables(tables)
