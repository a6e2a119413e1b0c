"""Make a task of labels: who a sample is of, where the patient lies, and how long the sample is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pipeline.arrays import Ints
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import SHARD_SCHEMA, task_schema
from pipeline.dataset.shards import read_rows
from pipeline.dataset.tables import iterate_index, read_vocabulary
from pipeline.dataset.tasks import Task, check_task_name, list_tasks, task_files
from pipeline.prepare.arrow_files import write_parquet
from pipeline.prepare.count_samples import SampleCounter
from pipeline.prepare.join_samples import join_samples, sort_patients
from pipeline.prepare.names import find_expressions
from pipeline.prepare.place_samples import place_samples
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.windows import WINDOW_SCHEMA, count_until
from pipeline.schema import PATIENT_ID, PREDICTION_MINUTE, UNKNOWN_CODE, UserError
from pipeline.storage.files import remove_leftovers
from pipeline.storage.folder import Folder, as_folder
from pipeline.storage.pieces import Pieces, checksum_file

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
) -> Task:
    """Write a task over the shards of a data directory, and return it; no other file changes.

    Args:
        directory: the data directory, of which the manifest may be still to come.
        manifest: of the directory.
        name: the task's name.
        labels: of patients as the data directory calls them.
        exclude_codes: regular expressions; events of variables in which one is found are in no sample.

    Raises:
        UserError: there is such a task, or the labels name no patient or have times that the data set does not know.
    """
    check_task_name(name)
    if name in list_tasks(directory):
        raise UserError(f"{directory}: has a task {name!r} already; remove it first, or choose another --name")
    folder = as_folder(directory)  # which verifies a file once
    excluded = _find_codes(folder, manifest, exclude_codes)
    if labels.samples.times == "date" and not _knows_dates(folder, manifest):
        raise UserError(f"{labels.origin}: has dates, but the data set was made of minutes; give prediction_minute")
    joined = join_samples(labels.samples, sort_patients(read_patient_names(folder, manifest)))
    if len(labels.samples) and not joined.num_found:
        raise UserError(f"{labels.origin}: names no patient of the input; give the labels of these patients")
    counter, counts, shards = _LengthCounter(folder, manifest, excluded), SampleCounter(labels), Counter[str]()

    def make_parts() -> Iterator[pl.DataFrame]:
        for samples in place_samples(labels, _read_index(folder, manifest), joined.records):
            samples = counter.count_lengths(samples)
            counts.add(samples)
            shards.update(dict(samples.filter(pl.col("num_events") > 0).group_by("shard").len().iter_rows()))
            yield samples

    schema = task_schema(labels.kind, soft=labels.is_soft)
    table_sha256, table_pieces = write_task_table(directory, name, make_parts(), schema)
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
        labels_without_patient=joined.num_strange,
    )
    task.save(directory)
    return task


def _find_codes(folder: Folder, manifest: Manifest, expressions: tuple[str, ...]) -> Ints:
    """Return the codes of the vocabulary in whose names an expression is found.

    Names of unknown variables are not kept, so any of them may be such a one: they are excluded with the others.
    """
    if not expressions:
        return np.zeros(0, np.int64)
    found = find_expressions(pl.Series(read_vocabulary(folder, manifest)["variable"].to_pylist()), expressions)
    found[UNKNOWN_CODE] = True
    return found.arg_true().to_numpy().astype(np.int64)


def _read_index(folder: Folder, manifest: Manifest) -> Iterator[pl.DataFrame]:
    names = (PATIENT_ID, "split", "shard", "position", "num_events", "num_sets", "time_origin")
    for part in iterate_index(folder, manifest, *names):
        yield pl.DataFrame(part)


def read_patient_names(directory: Path | Folder, manifest: Manifest) -> Iterator[pl.Series]:
    """Yield the names of the patients of a data directory in the order of its index, some at a time."""
    for part in iterate_index(directory, manifest, PATIENT_ID):
        yield pl.DataFrame(part)[PATIENT_ID]


def _knows_dates(folder: Folder, manifest: Manifest) -> bool:
    """Return whether a data directory has dates of minutes."""
    has_sets = False
    for part in iterate_index(folder, manifest, "time_origin", "num_sets"):
        if part["time_origin"].null_count < part.num_rows:
            return True
        has_sets |= bool((part["num_sets"].to_numpy() > 1).any())
    return not has_sets  # patients of one set may have static events alone, which say nothing of clocks


class _LengthCounter:
    """Counts the events and sets of samples; shards are read one by one, each once."""

    def __init__(self, folder: Folder, manifest: Manifest, excluded: Ints) -> None:
        self._folder, self._excluded = folder, excluded
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


def write_task_table(
    directory: Path, name: str, parts: Iterable[pl.DataFrame], schema: pa.Schema
) -> tuple[str, Pieces | None]:
    """Write the table of a task and return its checksums."""
    path = directory / task_files(name)[0]
    path.parent.mkdir(exist_ok=True)
    remove_leftovers(path.parent, f"{name}.*")
    write_parquet(path, schema, (samples.select(schema.names).to_arrow().cast(schema) for samples in parts))
    return checksum_file(path)
