"""Make a task of labels: who a sample is of, where the patient lies, and how long the sample is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrays import Ints, harden
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import SHARD_SCHEMA, task_schema
from pipeline.dataset.shards import read_rows
from pipeline.dataset.tables import open_checked, read_vocabulary, report_damage
from pipeline.dataset.tasks import SampleCounts, Task, check_task_name, list_tasks, task_files
from pipeline.prepare.arrow_files import write_parquet
from pipeline.prepare.names import find_expressions
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.sort_samples import cut_ranges
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
    UNKNOWN_CODE,
    UserError,
)
from pipeline.storage.files import remove_leftovers
from pipeline.storage.folder import as_folder
from pipeline.storage.pieces import Pieces, checksum_file

SLICE_ROWS: Final = 1 << 19
"""Maximum number of samples that are joined to their patients at once, unless one patient has more."""

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
    excluded = _find_codes(directory, manifest, exclude_codes)
    index = _read_index(directory, manifest)
    patients = labels.samples.patients
    number = _number_patients(index, patients if pseudonyms is None else pseudonyms.hide_names(patients))
    _check_patients(labels, index, number)
    is_known = np.zeros(len(patients), np.bool_)
    is_known[number[number >= 0]] = True
    counter, counts, shards = _LengthCounter(directory, manifest, excluded), _Counts(labels), Counter[str]()

    def make_slices() -> Iterator[pl.DataFrame]:
        for samples in _locate_samples(labels, index, number):
            samples = counter.count_lengths(samples)
            counts.add(samples)
            shards.update(dict(samples.filter(pl.col("num_events") > 0).group_by("shard").len().iter_rows()))
            yield samples

    schema = task_schema(labels.kind, soft=labels.is_soft)
    table_sha256, table_pieces = write_task_table(directory, name, make_slices(), schema)
    task = Task(
        name=name,
        kind=labels.kind,
        classes=labels.classes,
        data=manifest.fingerprint,
        table_sha256=table_sha256,
        table_pieces=table_pieces,
        times=labels.samples.times,
        splits=counts.finish(),
        shards=dict(sorted(shards.items())),
        excluded_codes=excluded.tolist(),
        labels_from=Path(labels.origin).name,
        soft_labels=labels.is_soft,
        labels_without_patient=int(labels.samples.sizes[~is_known].sum()),
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


def _read_index(directory: Path, manifest: Manifest) -> pl.DataFrame:
    names = [PATIENT_ID, "split", "shard", "position", "num_events", "num_sets", "time_origin"]
    with open_checked(directory, manifest, INDEX_FILE) as path, report_damage(as_folder(directory), INDEX_FILE):
        index = pl.from_arrow(pq.read_table(path, columns=names))
    assert isinstance(index, pl.DataFrame)
    return index


def _number_patients(index: pl.DataFrame, patients: pl.Series) -> Ints:
    """Return [rows of the index] the number of each patient among those of the labels; -1 = it has no label."""
    numbered = pl.DataFrame({PATIENT_ID: patients.alias(PATIENT_ID)}).with_row_index("number")
    joined = index.select(PATIENT_ID).join(numbered, on=PATIENT_ID, how="left", maintain_order="left")
    return joined["number"].cast(pl.Int64).fill_null(-1).to_numpy()


def _check_patients(labels: Labels, index: pl.DataFrame, number: Ints) -> None:
    """Raise UserError where labels name no patient of the index, or have dates and the index has minutes."""
    # A patient of one set may have static events alone, which say nothing of clocks.
    is_dated = index["time_origin"].null_count() < index.height or not (index["num_sets"] > 1).any()
    if labels.samples.times == "date" and not is_dated:
        raise UserError(f"{labels.origin}: has dates, but the data set was made of minutes; give prediction_minute")
    if labels.samples.offsets[-1] and not (number >= 0).any():
        raise UserError(f"{labels.origin}: names no patient of the input; give the labels of these patients")


def _locate_samples(labels: Labels, index: pl.DataFrame, number: Ints) -> Iterator[pl.DataFrame]:
    """Yield the samples with their patients' rows of the index, in its order, some patients at a time.

    Without prediction times every patient is a sample: one who has no label is unlabelled.  ``number`` [rows of the
    index] says which patient of the labels each is, or -1.
    """
    times, all_sizes = labels.samples.times, labels.samples.sizes
    sizes = np.ones(index.height, np.int64)
    if times:
        sizes = np.where(number >= 0, all_sizes[number], 0) if len(all_sizes) else np.zeros(index.height, np.int64)
    for low, high in cut_ranges(sizes, SLICE_ROWS) if index.height else [(0, 0)]:
        rows, of_rows = np.arange(low, high), number[low:high]
        has_labels = of_rows >= 0
        columns = labels.to_columns(labels.samples.gather(of_rows[has_labels]))
        if not times:
            (label,) = columns
            at = pl.Series(np.where(has_labels, np.cumsum(has_labels) - 1, -1))
            columns = [label.gather(at.set(at < 0, None))]
        samples = index[np.repeat(rows, sizes[low:high])].with_columns(columns)
        minute = pl.lit(None, pl.Float64)
        if times == "date":
            minute = (pl.col(PREDICTION_TIME) - pl.col("time_origin")).dt.total_microseconds() / MICROSECONDS
        elif times == "minute":
            minute = pl.col(PREDICTION_MINUTE)
        given = pl.col(PREDICTION_TIME) if times == "date" else pl.lit(None, pl.Datetime("us"))
        yield samples.with_columns(given.alias(PREDICTION_TIME), minute.alias(PREDICTION_MINUTE))


class _LengthCounter:
    """Counts the events and sets of samples; shards are read one by one, each once."""

    def __init__(self, directory: Path, manifest: Manifest, excluded: Ints) -> None:
        self._folder, self._excluded = as_folder(directory), excluded
        self._entries = {entry.path: entry for entries in manifest.splits.values() for entry in entries}
        self._schema = WINDOW_SCHEMA if not len(excluded) else WINDOW_SCHEMA.append(SHARD_SCHEMA.field("code"))
        self._read: tuple[str, pa.Table] | None = None

    def count_lengths(self, samples: pl.DataFrame) -> pl.DataFrame:
        """Return the samples with their own lengths in place of those of their patients, and ``whole_sets``."""
        if samples[PREDICTION_MINUTE].null_count() == samples.height and not len(self._excluded):
            return samples.with_columns(whole_sets=pl.lit(True))
        position = samples["position"].to_numpy()
        minute = samples[PREDICTION_MINUTE].fill_null(np.inf).to_numpy()
        lengths: npt.NDArray[np.int64] = np.empty((3, samples.height), np.int64)
        start = 0
        for path, size in samples["shard"].rle().struct.unnest().select("value", "len").iter_rows():
            own = slice(start, start := start + size)
            if self._read is None or self._read[0] != path:
                self._read = None  # at most one is in memory
                self._read = path, read_rows(self._folder, self._entries[path], self._schema)
            lengths[:, own] = count_until(self._read[1], position[own], minute[own], self._excluded)
        num_events, num_sets, whole_sets = map(pl.Series, lengths)
        return samples.with_columns(num_events=num_events, num_sets=num_sets, whole_sets=whole_sets.cast(pl.Boolean))


class _Counts:
    """Counts the samples of each split, some patients at a time."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._parts: dict[str, list[SampleCounts]] = {split: [] for split in SPLITS}

    def add(self, samples: pl.DataFrame) -> None:
        for split, parts in self._parts.items():
            own = samples.filter(split=split)
            if own.height:
                parts.append(_count_samples(own, self._labels))

    def finish(self) -> dict[str, SampleCounts]:
        return {
            split: _add_counts(parts) if parts else SampleCounts(class_counts=[0] * len(self._labels.classes))
            for split, parts in self._parts.items()
        }


def _count_samples(samples: pl.DataFrame, labels: Labels) -> SampleCounts:
    """Count samples of a split."""
    label = samples[LABEL].drop_nulls()
    is_number = labels.kind == "regression" and len(label) > 0
    of_class = harden(label.to_numpy()).astype(np.int64) if labels.classes else np.zeros(0, np.int64)
    return SampleCounts(
        num_samples=samples.height,
        num_patients=samples[PATIENT_ID].n_unique(),
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


def write_task_table(
    directory: Path, name: str, slices: Iterable[pl.DataFrame], schema: pa.Schema
) -> tuple[str, Pieces | None]:
    """Write the table of a task and return its checksums."""
    path = directory / task_files(name)[0]
    path.parent.mkdir(exist_ok=True)
    remove_leftovers(path.parent, f"{name}.*")
    write_parquet(path, schema, (samples.select(schema.names).to_arrow().cast(schema) for samples in slices))
    return checksum_file(path)
