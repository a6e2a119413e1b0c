"""The two stages that see all rows of a patient together: sort a partition, then write its shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.clean import DUPLICATE, REJECTS_SCHEMA
from pipeline.schema import MINUTE, PATIENT_ID, SET_INDEX, SPLITS, UNKNOWN_CODE, VALUE
from pipeline.shards import INDEX_SCHEMA, SHARD_SCHEMA, ShardEntry, write_shard
from pipeline.sources.source import FILE, LABEL, MICROSECONDS, ROW, SPLIT
from pipeline.spill import PartitionRows, read_partition, read_slice, read_table, write_table
from pipeline.statistics import Moments, SplitRule

Ints: TypeAlias = npt.NDArray[np.integer[Any]]
Bools: TypeAlias = npt.NDArray[np.bool_]

MOST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedPartition:
    """What sorting a partition found.

    Attributes:
        train: moments of the train split.
        num_events: events kept, of all splits.
        without_events: patients that have no kept row, and are not written.
        num_labels: rows of the label file that name one of its patients.
    """

    train: Moments
    num_events: int
    without_events: list[str]
    num_labels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPartition:
    """The shards of a partition, their rows of the index (both by split), and counts of events."""

    shards: dict[str, ShardEntry]
    index: dict[str, pa.Table]
    num_events: int
    num_unknown: int


def sort_partition(
    work: Path, num_pieces: int, partition: int, num_partitions: int, rule: SplitRule
) -> SortedPartition:
    """Drop duplicates, make sets, sort; to ``sorted/<partition>.arrow`` and ``duplicates/<partition>.parquet``.

    The sorted file holds the shards of all splits before codes are known: ``code`` is a position among the variables
    named in its metadata, and ``value`` is not scaled.
    """
    rows = read_partition(work / "spills", num_pieces, partition, num_partitions)
    facts, _ = read_slice(work / "facts.arrow", partition, num_partitions)

    events = _sort_events(rows)
    duplicate = _repeats(events, ["patient", "set", "variable", "value", "minute"])
    _write_duplicates(work / "duplicates" / f"{partition:05d}.parquet", rows, events.filter(pl.Series(duplicate)))
    events = events.filter(pl.Series(~duplicate))
    patient, code, value = (events[name].to_numpy() for name in ("patient", "variable", "value"))

    set_start = np.flatnonzero(~_repeats(events, ["patient", "set"]))
    set_size = np.diff(set_start, append=len(patient))
    set_patient = patient[set_start]
    patient_start = np.flatnonzero(np.diff(set_patient, prepend=-1))
    num_sets = np.diff(patient_start, append=len(set_start))
    patients = _patients(rows.patient_ids, facts, rule)
    present = set_patient[patient_start]
    num_events = np.bincount(patient, minlength=patients.height)[present]
    split = patients[SPLIT].to_numpy()
    in_train = (split == SPLITS.index("train"))[patient]

    table = pa.table(
        {
            "patient_id": patients[PATIENT_ID].gather(present).to_arrow().cast(pa.string()),
            "label": patients[LABEL].gather(present).to_arrow(),
            "num_events": num_events.astype(np.int32),
            "num_sets": num_sets.astype(np.int32),
            "minute": _lists(num_sets, _reduce(np.minimum, events["minute"].to_numpy(), set_start)),
            "set_size": _lists(num_sets, set_size.astype(np.int32)),
            "code": _lists(num_events, code),
            "value": _lists(num_events, value),
            "max_set_size": _reduce(np.maximum, set_size, patient_start).astype(np.int32),
            "split_number": split[present],
        },
    ).take(np.lexsort((present, num_sets, num_events)))  # names are in order, so their positions are
    write_table(
        work / "sorted" / f"{partition:05d}.arrow",
        table.replace_schema_metadata({"variables": json.dumps(rows.variables)}),
    )
    absent = np.ones(patients.height, dtype=np.bool_)
    absent[present] = False
    return SortedPartition(
        train=Moments.of(rows.variables, code[in_train], value[in_train]),
        num_events=len(patient),
        without_events=patients[PATIENT_ID].filter(pl.Series(absent)).to_list(),
        num_labels=int(patients["in_labels"].sum()),
    )


def _sort_events(rows: PartitionRows) -> pl.DataFrame:
    """``patient``, ``set``, ``variable``, ``value``, ``minute``, ``position`` in the order of shards.

    Sets stand in the order of their least minute, then of ``set_index``; events of a set in the order of variable,
    value (none last) and minute; like events as they came.
    """
    minute, value = rows.table[MINUTE].to_numpy(), rows.table[VALUE].to_numpy()
    events = pl.DataFrame({"patient": rows.patient, "variable": rows.variable, "value": value, "minute": minute})
    if minute.dtype == np.int64:
        since_first = pl.col("minute") - pl.col("minute").min().over("patient")
        events = events.with_columns(since_first / MICROSECONDS)
    keys = ["patient", "set", "variable", "value", "minute"]
    if SET_INDEX in rows.table.column_names:
        events = events.with_columns(pl.Series("set", rows.table[SET_INDEX].to_numpy()))
        events = events.with_columns(pl.col("minute").min().over("patient", "set").alias("first"))
        keys.insert(1, "first")
    else:
        events = events.with_columns(pl.col("minute").floor().alias("set"))
    return events.with_row_index("position").sort(keys, maintain_order=True)


def _repeats(events: pl.DataFrame, columns: list[str]) -> Bools:
    """[E] whether an event equals the one before it in all ``columns``; NaN equals NaN."""
    repeats = np.ones(events.height, dtype=np.bool_)
    repeats[:1] = False
    for name in columns:
        column = events[name].to_numpy()
        before, after = column[:-1], column[1:]
        same = before == after
        if column.dtype.kind == "f":
            same |= np.isnan(before) & np.isnan(after)
        repeats[1:] &= same
    return repeats


def _patients(patient_ids: list[str], facts: pa.Table, rule: SplitRule) -> pl.DataFrame:
    """``patient_id``, ``label``, ``split`` (position in ``SPLITS``), ``in_labels``; in the order given."""
    known = pl.from_arrow(facts.drop_columns("hash"))
    assert isinstance(known, pl.DataFrame)
    patients = pl.DataFrame({PATIENT_ID: pl.Series(patient_ids, dtype=pl.String)})
    patients = patients.join(known, on=PATIENT_ID, how="left", maintain_order="left")
    by_hash = pl.Series(rule.split(patient_ids))
    return patients.with_columns(pl.col(SPLIT).fill_null(by_hash), pl.col("in_labels").fill_null(False))


def _reduce(function: np.ufunc, values: npt.NDArray[Any], starts: Ints) -> npt.NDArray[Any]:
    reduced: npt.NDArray[Any] = function.reduceat(values, starts) if len(starts) else values[:0]
    return reduced


def _lists(sizes: Ints, values: npt.NDArray[Any]) -> pa.Array:
    """Lists of the given sizes, one after the other in ``values``; NaN becomes null."""
    return pa.ListArray.from_arrays(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), pa.array(values, from_pandas=True)
    )


def _write_duplicates(path: Path, rows: PartitionRows, duplicates: pl.DataFrame) -> None:
    """As rejects, in canonical form: a duplicate has passed all tests, and its text is no longer there."""
    origin = rows.table.select([FILE, ROW, MINUTE, VALUE]).take(duplicates["position"].to_numpy())
    table = pa.table(
        {
            "reason": pa.repeat(pa.scalar(DUPLICATE), duplicates.height),
            "file": origin[FILE].cast(pa.string()),
            "row": origin[ROW],
            "patient_id": pa.array(rows.patient_ids, pa.string()).take(duplicates["patient"].to_arrow()),
            "minute": duplicates["minute"].to_arrow().cast(pa.string()),
            "variable": pa.array(rows.variables, pa.string()).take(duplicates["variable"].to_arrow()),
            "value": origin[VALUE].cast(pa.string()),
        },
    )
    pq.write_table(table.cast(REJECTS_SCHEMA), path)


def write_partition(work: Path, data: Path, partition: int, vocabulary: pa.Table) -> WrittenPartition:
    """Write one shard a split below ``data``, with the vocabulary's codes and scaled values."""
    table = read_table(work / "sorted" / f"{partition:05d}.arrow")
    variables = json.loads(table.schema.metadata[b"variables"])
    code_of = dict(zip(vocabulary["variable"].to_pylist(), range(vocabulary.num_rows), strict=True))
    codes = np.array([code_of.get(variable, UNKNOWN_CODE) for variable in variables], dtype=np.int32)
    shards: dict[str, ShardEntry] = {}
    index: dict[str, pa.Table] = {}
    num_unknown = 0
    for number, split in enumerate(SPLITS):
        rows = table.filter(pa.array(table["split_number"].to_numpy() == number))
        if not rows.num_rows:
            continue
        code = codes[rows["code"].combine_chunks().flatten().to_numpy()]
        value = rows["value"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        unknown = code == UNKNOWN_CODE
        if unknown.any():  # they stand where their names would
            num_unknown += int(unknown.sum())
            set_sizes = rows["set_size"].combine_chunks().flatten().to_numpy()
            order = np.lexsort((code, np.repeat(np.arange(len(set_sizes)), set_sizes)))
            code, value = code[order], value[order]
        scaled = (value - vocabulary["mean"].to_numpy()[code]) / vocabulary["std"].to_numpy()[code]
        shard = pa.table(
            {
                **{name: rows[name] for name in SHARD_SCHEMA.names},
                "code": _lists(rows["num_events"].to_numpy(), code),
                "value": _lists(rows["num_events"].to_numpy(), scaled.clip(-MOST, MOST).astype(np.float32)),
            }
        ).cast(SHARD_SCHEMA)
        path = f"{split}/{partition:05d}.parquet"
        shards[split] = write_shard(shard, data, path)
        rows = rows.append_column("split", pa.repeat(split, rows.num_rows))
        rows = rows.append_column("shard", pa.repeat(path, rows.num_rows))
        rows = rows.append_column("position", pa.array(np.arange(rows.num_rows)))
        index[split] = rows.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    return WrittenPartition(
        shards=shards,
        index=index,
        num_events=sum(shard.num_events for shard in shards.values()),
        num_unknown=num_unknown,
    )
