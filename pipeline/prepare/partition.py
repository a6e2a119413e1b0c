"""The two stages that see all rows of a patient together: sort a partition, then write its shards."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import ShardEntry
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SCHEMA
from pipeline.dataset.shards import write_shard
from pipeline.prepare.clean import DUPLICATE, NO_ORIGIN, REJECTS_SCHEMA
from pipeline.prepare.moments import Moments
from pipeline.prepare.rules import Bools, Limits, Rules, Sieve, repeats
from pipeline.prepare.sources.source import FILE, LABEL, MICROSECONDS, ROW, SPLIT, Origin
from pipeline.prepare.spill import STATIC_INSTANT, PartitionRows, read_partition, read_slice, read_table, write_table
from pipeline.prepare.splits import SplitRule
from pipeline.schema import FLOAT32_MAX, MINUTE, PATIENT_ID, SET_INDEX, SPLITS, UNKNOWN_CODE, VALUE
from pipeline.storage.files import replace_atomically

Ints: TypeAlias = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SortedPartition:
    """What sorting a partition found.

    Attributes:
        train: moments of the train split.
        num_events: events kept, of all splits.
        without_events: patients that have no kept row, and are not written.
        num_labels: rows of the label file that name one of its patients.
        num_split_by_hash: patients that the input gives no split.
        num_clipped: values that a rule changed.
        rejects: rows of the spills that are not kept, by reason.
    """

    train: Moments
    num_events: int
    without_events: list[str]
    num_labels: int
    num_split_by_hash: int
    num_clipped: int
    rejects: dict[str, int]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(**(content | {"train": Moments.from_json(content["train"])}))


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPartition:
    """The shards of a partition, of each split one a format, and counts of events: all, and unknown by variable."""

    shards: dict[str, list[ShardEntry]]
    num_events: int
    unknown: dict[str, int]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        shards = {split: [ShardEntry(**entry) for entry in entries] for split, entries in content["shards"].items()}
        return cls(**(content | {"shards": shards}))


def measure_partition(
    work: Path, num_pieces: int, partition: int, num_partitions: int, rule: SplitRule, origin: Origin
) -> Moments:
    """Of the train split, duplicates dropped: what outliers are told by, before anything is written."""
    rows, patients, sieve = _read_sorted(work, num_pieces, partition, num_partitions, rule, origin)
    in_train = _in_train(patients)[sieve.kept["patient"].to_numpy()]
    variable, value = (sieve.kept[name].to_numpy()[in_train] for name in ("variable", "value"))
    return Moments.of(rows.variables, variable, value)


def sort_partition(
    work: Path,
    num_pieces: int,
    partition: int,
    num_partitions: int,
    rule: SplitRule,
    origin: Origin,
    rules: Rules,
    limits: Limits,
) -> SortedPartition:
    """Drop duplicates, apply the rules, make sets, sort; to ``sorted/<partition>.arrow`` and ``late_rejects/``.

    The sorted file holds the shards of all splits before codes are known: ``code`` is a position among the variables
    named in its metadata, and ``value`` is not scaled.
    """
    rows, patients, sieve = _read_sorted(work, num_pieces, partition, num_partitions, rule, origin)
    if limits:
        sieve.limit(rows.variables, limits, rules.outlier_action)
    if rules.aggregate != "none":
        sieve.aggregate(rules.aggregate)
    if rules.min_events > 1:
        sieve.drop_short(rules.min_events)
    _write_rejects(work / "late_rejects" / f"{partition:05d}.parquet", rows, sieve.rejected)
    events = sieve.kept
    patient, code, value = (events[name].to_numpy() for name in ("patient", "variable", "value"))

    set_start = np.flatnonzero(~repeats(events, ["patient", "set"]))
    set_size = np.diff(set_start, append=len(patient))
    set_minute = _reduce(np.minimum, events["minute"].to_numpy(), set_start)
    set_patient = patient[set_start]
    patient_start = np.flatnonzero(np.diff(set_patient, prepend=-1))
    num_sets = np.diff(patient_start, append=len(set_start))
    present = set_patient[patient_start]
    num_events = np.bincount(patient, minlength=patients.height)[present]
    split = patients[SPLIT].to_numpy()
    in_train = _in_train(patients)[patient]

    table = pa.table(
        {
            "patient_id": patients[PATIENT_ID].gather(present).to_arrow().cast(pa.string()),
            "label": patients[LABEL].gather(present).to_arrow(),
            "num_events": num_events.astype(np.int32),
            "num_sets": num_sets.astype(np.int32),
            "minute": _lists(num_sets, np.where(np.isneginf(set_minute), np.nan, set_minute)),
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
        num_split_by_hash=int(patients["by_hash"].sum()),
        num_clipped=sieve.num_clipped,
        rejects={reason: events.height for reason, events in sieve.rejected.items()},
    )


def _read_sorted(
    work: Path, num_pieces: int, partition: int, num_partitions: int, rule: SplitRule, origin: Origin
) -> tuple[PartitionRows, pl.DataFrame, Sieve]:
    """A partition's rows, what is known of its patients, and its events in the order of shards, without duplicates."""
    rows = read_partition(work / "spills", num_pieces, partition, num_partitions)
    facts, _ = read_slice(work / "facts.arrow", partition, num_partitions)
    sieve = _sort_events(rows, origin)
    sieve.drop(DUPLICATE, repeats(sieve.kept, ["patient", "set", "variable", "value", "minute"]))
    return rows, _patients(rows.patient_ids, facts, rule), sieve


def _in_train(patients: pl.DataFrame) -> Bools:
    return (patients[SPLIT] == SPLITS.index("train")).to_numpy()


def _sort_events(rows: PartitionRows, origin: Origin) -> Sieve:
    """``patient``, ``set``, ``variable``, ``value``, ``minute``, ``position`` in the order of shards.

    Sets stand in the order of their least minute, then of ``set_index``; events of a set in the order of variable,
    value (none last) and minute; like events as they came.  The minute of static events is before all: minus infinity.
    """
    minute, value = rows.table[MINUTE].to_numpy(), rows.table[VALUE].to_numpy()
    instants = minute.dtype == np.int64
    if instants:
        minute = _since_origin(minute, rows, origin)
    columns = {"patient": rows.patient, "variable": rows.variable, "value": value, "minute": minute}
    sieve = Sieve(pl.DataFrame(columns).with_row_index("position"))
    if instants:
        sieve.drop(NO_ORIGIN, np.isnan(minute))
    if SET_INDEX in rows.table.column_names:
        set_index = pl.Series("set", rows.table[SET_INDEX].to_numpy()).gather(sieve.kept["position"])
        first = pl.col("minute").min().over("patient", "set")
        sieve.kept = sieve.kept.with_columns(set_index).with_columns(first=first)
        keys = ["patient", "first", "set", "variable", "value", "minute"]
        sieve.kept = sieve.kept.sort(keys, maintain_order=True).drop("first")
    else:
        sieve.kept = sieve.kept.with_columns(pl.col("minute").floor().alias("set"))
        patient, set_, variable, value, minute = (
            sieve.kept[name].to_numpy() for name in ("patient", "set", "variable", "value", "minute")
        )
        sieve.kept = sieve.kept[sort_order((patient, set_, variable), (value, minute))]
    return sieve


def _since_origin(instant: npt.NDArray[np.int64], rows: PartitionRows, origin: Origin) -> npt.NDArray[np.float64]:
    """[E] minutes from the patient's first event that counts as origin, else, where the input names no variable for
    it, from its first; NaN where there is none, minus infinity of static events.
    """
    never = np.iinfo(np.int64).max
    start = np.flatnonzero(np.diff(rows.patient, prepend=-1))
    timed = instant != STATIC_INSTANT
    counts = timed & origin.counts(rows.variables)[rows.variable]
    first = np.full((2, len(rows.patient_ids)), never)
    for found, which in zip(first, (counts, timed), strict=True):
        np.minimum.at(found, rows.patient[start], _reduce(np.minimum, np.where(which, instant, never), start))
    if origin.variable is None:
        first[0] = np.where(first[0] == never, first[1], first[0])
    zero = first[0][rows.patient]
    minute = np.where(zero == never, np.nan, (instant - zero) / MICROSECONDS)
    return np.where(timed, minute, -math.inf)


def sort_order(keys: Sequence[npt.NDArray[Any]], ties: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """The order by ``keys``, whole numbers or minus infinity, then by ``ties``, NaN last; like rows as they came.

    The keys become one integer where 64 bits hold their ranges, which sorts several times as fast as columns do, and
    ties are looked at only where there are any.
    """
    packed = np.zeros(len(keys[0]), np.uint64)
    bits = 0
    for key in keys:
        finite = key[np.isfinite(key)] if key.dtype.kind == "f" else key
        low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
        span = int(high) - int(low) + 1  # minus infinity is one below the least
        bits += (width := span.bit_length())
        if bits > 64 or span >= 1 << 53:
            return np.lexsort([*reversed(ties), *reversed(keys)])
        packed <<= np.uint64(width)
        packed |= np.where(key < low, 0, key - low + 1).astype(np.uint64)
    order = np.argsort(packed, kind="stable")
    packed = packed[order]
    equal = packed[1:] == packed[:-1]
    if equal.any():
        tied = np.flatnonzero(np.concatenate([[False], equal]) | np.concatenate([equal, [False]]))
        rows = order[tied]
        order[tied] = rows[np.lexsort([*(tie[rows] for tie in reversed(ties)), packed[tied]])]
    return order


def _patients(patient_ids: list[str], facts: pa.Table, rule: SplitRule) -> pl.DataFrame:
    """``patient_id``, ``label``, ``split`` (position in ``SPLITS``), ``in_labels``, ``by_hash``; in the order given."""
    known = pl.from_arrow(facts.drop_columns("hash"))
    assert isinstance(known, pl.DataFrame)
    patients = pl.DataFrame({PATIENT_ID: pl.Series(patient_ids, dtype=pl.String)})
    patients = patients.join(known, on=PATIENT_ID, how="left", maintain_order="left")
    return patients.with_columns(
        pl.col(SPLIT).fill_null(pl.Series(rule.split(patient_ids))),
        pl.col("in_labels").fill_null(False),
        pl.col("by_hash").fill_null(True),
    )


def _reduce(function: np.ufunc, values: npt.NDArray[Any], starts: Ints) -> npt.NDArray[Any]:
    reduced: npt.NDArray[Any] = function.reduceat(values, starts) if len(starts) else values[:0]
    return reduced


def _lists(sizes: Ints, values: npt.NDArray[Any]) -> pa.Array:
    """Lists of the given sizes, one after the other in ``values``; NaN becomes null."""
    return pa.ListArray.from_arrays(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), pa.array(values, from_pandas=True)
    )


def _write_rejects(path: Path, rows: PartitionRows, rejected: dict[str, pl.DataFrame]) -> None:
    """In canonical form: these rows have passed all tests of ``pipeline.prepare.clean``, and their text is no longer
    there.
    """
    tables = []
    for reason, events in rejected.items():
        origin = rows.table.select([FILE, ROW, VALUE]).take(events["position"].to_numpy())
        table = {
            "reason": pa.repeat(pa.scalar(reason), events.height),
            "file": origin[FILE].cast(pa.string()),
            "row": origin[ROW],
            "patient_id": pa.array(rows.patient_ids, pa.string()).take(events["patient"].to_arrow()),
            "minute": events["minute"].fill_nan(None).replace(-math.inf, None).to_arrow().cast(pa.string()),
            "variable": pa.array(rows.variables, pa.string()).take(events["variable"].to_arrow()),
            "value": origin[VALUE].cast(pa.string()),
        }
        tables.append(pa.table(table).cast(REJECTS_SCHEMA))
    with replace_atomically(path) as temporary:
        pq.write_table(pa.concat_tables(tables) if tables else REJECTS_SCHEMA.empty_table(), temporary)


def write_partition(
    work: Path, data: Path, partition: int, vocabulary: pa.Table, suffixes: Sequence[str]
) -> WrittenPartition:
    """Write one shard a split below ``data``, with the vocabulary's codes and scaled values.

    Its rows of the index go to ``index/<split>-<partition>.arrow``, and name the shard of the first suffix.
    """
    table = read_table(work / "sorted" / f"{partition:05d}.arrow")
    variables = json.loads(table.schema.metadata[b"variables"])
    code_of = dict(zip(vocabulary["variable"].to_pylist(), range(vocabulary.num_rows), strict=True))
    codes = np.array([code_of.get(variable, UNKNOWN_CODE) for variable in variables], dtype=np.int32)
    shards: dict[str, list[ShardEntry]] = {}
    unknown: Counter[str] = Counter()
    for number, split in enumerate(SPLITS):
        rows = table.filter(pa.array(table["split_number"].to_numpy() == number))
        if not rows.num_rows:
            continue
        place = rows["code"].combine_chunks().flatten().to_numpy()
        code = codes[place]
        value = rows["value"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if (code == UNKNOWN_CODE).any():  # they stand where their names would
            count = np.bincount(place, minlength=len(variables))
            unknown += Counter({variables[at]: int(count[at]) for at in np.flatnonzero(codes == UNKNOWN_CODE)})
            set_sizes = rows["set_size"].combine_chunks().flatten().to_numpy()
            order = np.lexsort((code, np.repeat(np.arange(len(set_sizes)), set_sizes)))
            code, value = code[order], value[order]
        scaled = (value - vocabulary["mean"].to_numpy()[code]) / vocabulary["std"].to_numpy()[code]
        shard = pa.table(
            {
                **{name: rows[name] for name in SHARD_SCHEMA.names},
                "code": _lists(rows["num_events"].to_numpy(), code),
                "value": _lists(
                    rows["num_events"].to_numpy(), scaled.clip(-FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)
                ),
            }
        ).cast(SHARD_SCHEMA)
        paths = [f"{split}/{partition:05d}{suffix}" for suffix in suffixes]
        shards[split] = [write_shard(shard, data, path) for path in paths]
        rows = rows.append_column("split", pa.repeat(split, rows.num_rows))
        rows = rows.append_column("shard", pa.repeat(paths[0], rows.num_rows))
        rows = rows.append_column("position", pa.array(np.arange(rows.num_rows)))
        index = rows.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        write_table(work / "index" / f"{split}-{partition:05d}.arrow", index)
    return WrittenPartition(
        shards=shards,
        num_events=sum(entries[0].num_events for entries in shards.values()),
        unknown=dict(unknown),
    )
