"""The schemas of a data set's tables, and the files of a shard."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

# Files of a shard by ``--shard_format``; the first is the one that training reads.
SHARD_SUFFIXES: Final = {"parquet": (".parquet",), "webdataset": (".tar",), "both": (".parquet", ".tar")}

SHARD_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("num_events", pa.int32(), nullable=False),
        pa.field("num_sets", pa.int32(), nullable=False),
        pa.field("minute", pa.list_(pa.field("item", pa.float64())), nullable=False),  # a set; null = the static set
        pa.field("set_size", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # a set
        pa.field("code", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),  # an event
        pa.field("value", pa.list_(pa.field("item", pa.float32())), nullable=False),  # an event; null = no number
        # An event; null = each has the minute of its set.  Only windows are made of it, so training does not read it.
        pa.field("event_minute", pa.list_(pa.field("item", pa.float64()))),
    ]
)
TRAINED_SCHEMA = pa.schema([field for field in SHARD_SCHEMA if field.name != "event_minute"])
"""The columns of a shard that training reads."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # path below the data directory
        pa.field("position", pa.int32(), nullable=False),  # row of the shard
        pa.field("num_events", pa.int32(), nullable=False),
        pa.field("num_sets", pa.int32(), nullable=False),
        pa.field("max_set_size", pa.int32(), nullable=False),
        pa.field("time_origin", pa.timestamp("us")),  # of minute 0, UTC; null where the input has minutes
    ]
)

TASK_SCHEMA = pa.schema(  # of a binary task; other kinds have labels of another type
    [
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # as in the index
        pa.field("position", pa.int32(), nullable=False),
        pa.field("prediction_time", pa.timestamp("us")),  # UTC; null where the labels have minutes or no time
        pa.field("prediction_minute", pa.float64()),  # null = the whole patient
        pa.field("label", pa.int8()),  # null = unlabelled; of classes their number, of a regression float64
        pa.field("num_events", pa.int32(), nullable=False),  # up to the prediction time, which may be before all
        pa.field("num_sets", pa.int32(), nullable=False),
        pa.field("whole_sets", pa.bool_(), nullable=False),  # whether no event of its last set is later
    ]
)

LABEL_TYPES: Final = {"binary": pa.int8(), "multiclass": pa.int32(), "regression": pa.float64()}
"""The type of a task's labels, by its kind."""


def task_schema(kind: str, *, soft: bool = False) -> pa.Schema:
    """Return the schema of the table of a task of this kind, whose labels may be soft."""
    position = TASK_SCHEMA.get_field_index("label")
    return TASK_SCHEMA.set(position, pa.field("label", pa.float32() if soft else LABEL_TYPES[kind]))


VOCABULARY_SCHEMA = pa.schema(
    [
        pa.field("code", pa.int32(), nullable=False),
        pa.field("variable", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("std", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),  # outliers are below low or above high; null where there is no such rule
        pa.field("high", pa.float64()),
        pa.field("description", pa.string()),  # null where the input has none
    ]
)
