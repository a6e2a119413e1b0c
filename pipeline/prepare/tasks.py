"""Make a task of labels: who a sample is of, where the patient lies, and how long the sample is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrays import Ints
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import SHARD_SCHEMA, task_schema
from pipeline.dataset.shards import read_rows
from pipeline.dataset.tables import open_checked, read_vocabulary, report_damage
from pipeline.dataset.tasks import SampleCounts, Task, check_task_name, list_tasks, task_files
from pipeline.prepare.names import find_expressions
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.times import MICROSECONDS
from pipeline.prepare.windows import WINDOW_SCHEMA, count_until
from pipeline.schema import (
    INDEX_FILE,
    LABEL,
    PATIENT_ID,
    PREDICTION_MINUTE,
    PREDICTION_TIME,
    SPLITS,
    TIME_COLUMNS,
    UNKNOWN_CODE,
    Times,
    UserError,
)
from pipeline.storage.files import file_sha256, remove_leftovers, replace_atomically
from pipeline.storage.folder import as_folder

ROWS_A_GROUP: Final = 1 << 16
"""Rows of a row group of a task's table: a group of shards is read without the rest of the table."""

EXCLUDE_CODES: Final = (r"^MEDS_DEATH(//|$)", r"(?i)(^|[/_ ])(death|died|deceased|discharge)([/_ ]|$)")
"""Codes that give an outcome away, or stand for the end of what is to be predicted."""


def default_exclusions(format_name: str, labels: Labels) -> tuple[str, ...]:
    """Return the expressions of codes that no sample of these labels may have, where nobody says which.

    What is recorded before a prediction time is history.  A whole MEDS patient ends with what is to be predicted.
    """
    return EXCLUDE_CODES if format_name == "meds" and labels.time_column is None else ()


def write_task(
    directory: Path,
    manifest: Manifest,
    name: str,
    labels: Labels,
    exclude_codes: tuple[str, ...] = (),
    pseudonyms: Pseudonyms | None = None,
) -> Task:
    """Write a task over the shards of a data directory, and return it; no other file changes.

    Args:
        directory: the data directory, of which the manifest may be still to come.
        manifest: of the directory.
        name: the task's name.
        labels: a row a sample.
        exclude_codes: regular expressions; events of variables in which one is found are in no sample.
        pseudonyms: replace the ids of the labels, as they did in the data set.

    Raises:
        UserError: there is such a task, or the labels name no patient or have times that the data set does not know.
    """
    check_task_name(name)
    if name in list_tasks(directory):
        raise UserError(f"{directory}: has a task {name!r} already; remove it first, or choose another --name")
    frame = labels.frame
    if pseudonyms is not None:
        frame = frame.with_columns(pseudonyms.hide_names(frame[PATIENT_ID]))
    excluded = _find_codes(directory, manifest, exclude_codes)
    samples = _locate_samples(directory, manifest, labels, frame)
    samples = _count_lengths(directory, manifest, samples, excluded)
    times: dict[str | None, Times] = {column: kind for kind, column in TIME_COLUMNS.items()}
    task = Task(
        name=name,
        kind=labels.kind,
        classes=labels.classes,
        data=manifest.fingerprint,
        table_sha256=_write_table(directory, name, samples, task_schema(labels.kind)),
        times=times.get(labels.time_column),
        splits={split: _count_samples(samples.filter(split=split), labels) for split in SPLITS},
        shards=dict(samples.filter(pl.col("num_events") > 0).group_by("shard").len().sort("shard").iter_rows()),
        excluded_codes=excluded.tolist(),
        labels_from=Path(labels.origin).name,
        labels_without_patient=frame.join(samples, on=PATIENT_ID, how="anti").height,
    )
    task.save(directory)
    return task


def _find_codes(directory: Path, manifest: Manifest, expressions: tuple[str, ...]) -> Ints:
    """Return the codes of the vocabulary in whose names an expression is found.

    Names of unknown variables are not kept, so any of them may be such a one: they are excluded with the others.
    """
    if not expressions:
        return np.zeros(0, np.int64)
    found = find_expressions(pl.Series(read_vocabulary(directory, manifest)["variable"].to_pylist()), expressions)
    found[UNKNOWN_CODE] = True
    return found.arg_true().to_numpy().astype(np.int64)


def _locate_samples(directory: Path, manifest: Manifest, labels: Labels, frame: pl.DataFrame) -> pl.DataFrame:
    """Return the samples with their patients' rows of the index, in its order.

    Without prediction times every patient is a sample: one who has no label is unlabelled.
    """
    names = [PATIENT_ID, "split", "shard", "position", "num_events", "num_sets", "time_origin"]
    with open_checked(directory, manifest, INDEX_FILE) as path, report_damage(as_folder(directory), INDEX_FILE):
        table = pq.read_table(path, columns=names)
    index = pl.from_arrow(table)
    assert isinstance(index, pl.DataFrame)
    time = labels.time_column
    # A patient of one set may have static events alone, which say nothing of clocks.
    if time == PREDICTION_TIME and index["time_origin"].null_count() == index.height and (index["num_sets"] > 1).any():
        raise UserError(f"{labels.origin}: has dates, but the data set was made of minutes; give prediction_minute")
    samples = index.with_row_index("order").join(frame, on=PATIENT_ID, how="inner" if time else "left")
    samples = samples.sort("order", *([time] if time else []), maintain_order=True)
    if frame.height and not frame[PATIENT_ID].is_in(index[PATIENT_ID].implode()).any():
        raise UserError(f"{labels.origin}: names no patient of the input; give the labels of these patients")
    minute = pl.lit(None, pl.Float64)
    if time == PREDICTION_TIME:
        minute = (pl.col(time) - pl.col("time_origin")).dt.total_microseconds() / MICROSECONDS
    elif time == PREDICTION_MINUTE:
        minute = pl.col(time)
    given = pl.col(PREDICTION_TIME) if time == PREDICTION_TIME else pl.lit(None, pl.Datetime("us"))
    return samples.with_columns(given.alias(PREDICTION_TIME), minute.alias(PREDICTION_MINUTE))


def _count_lengths(directory: Path, manifest: Manifest, samples: pl.DataFrame, excluded: Ints) -> pl.DataFrame:
    """Return the samples with their own lengths in place of those of their patients; shards are read one by one."""
    if samples[PREDICTION_MINUTE].null_count() == samples.height and not len(excluded):
        return samples
    entries = {entry.path: entry for entries in manifest.splits.values() for entry in entries}
    schema = WINDOW_SCHEMA if not len(excluded) else WINDOW_SCHEMA.append(SHARD_SCHEMA.field("code"))
    position = samples["position"].to_numpy()
    minute = samples[PREDICTION_MINUTE].fill_null(np.inf).to_numpy()
    lengths: npt.NDArray[np.int64] = np.empty((2, samples.height), np.int64)
    start = 0
    for path, size in samples["shard"].rle().struct.unnest().select("value", "len").iter_rows():
        own = slice(start, start := start + size)
        rows = read_rows(as_folder(directory), entries[path], schema)
        lengths[:, own] = count_until(rows, position[own], minute[own], excluded)
    return samples.with_columns(num_events=pl.Series(lengths[0]), num_sets=pl.Series(lengths[1]))


def _count_samples(samples: pl.DataFrame, labels: Labels) -> SampleCounts:
    """Count the samples of a split."""
    label = samples[LABEL].drop_nulls()
    is_number = labels.kind == "regression" and len(label) > 0
    return SampleCounts(
        num_samples=samples.height,
        num_patients=samples[PATIENT_ID].n_unique(),
        num_labelled=len(label),
        num_without_events=int((samples["num_events"] == 0).sum()),
        class_counts=np.bincount(label, minlength=len(labels.classes)).tolist() if labels.classes else [],
        mean=float(np.mean(label.to_numpy())) if is_number else None,
        std=float(np.std(label.to_numpy())) if is_number else None,
    )


def _write_table(directory: Path, name: str, samples: pl.DataFrame, schema: pa.Schema) -> str:
    """Write the table of a task and return its checksum."""
    path = directory / task_files(name)[0]
    path.parent.mkdir(exist_ok=True)
    remove_leftovers(path.parent, f"{name}.*")
    table = samples.select(schema.names).to_arrow().cast(schema)
    with replace_atomically(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROWS_A_GROUP)
    return file_sha256(path)
