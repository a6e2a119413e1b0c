"""From an input to a data directory, by way of tasks that run on any ``concurrent.futures.Executor``.

1. *Spill*, a task a piece of the input: read, clean, and put the kept rows on disk, sorted by a hash of the patient.
2. *Sort*, a task a partition (a range of hashes, cut from all spills): drop duplicates, make sets, sort, and take the
   moments of the train split; which are then merged to the vocabulary.
3. *Write*, a task a partition: codes and scaled values, to one shard a split.

Pieces and partitions follow from the input alone, so the output is the same, byte for byte, whatever runs the tasks.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, ParamSpec, Protocol, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.clean import DUPLICATE, REJECTS_SCHEMA, clean
from pipeline.monitor import peak_rss_bytes
from pipeline.partition import WrittenPartition, sort_partition, write_partition
from pipeline.publish import output_folder
from pipeline.schema import (
    EMBEDDINGS_FILE,
    FIRST_CODE,
    INDEX_FILE,
    PATIENT_ID,
    REJECTS_FILE,
    SPLITS,
    SUMMARY_FILE,
    VOCABULARY_FILE,
    UserError,
)
from pipeline.shards import Manifest, file_sha256, sync, write_atomically
from pipeline.sources.side_files import read_embeddings, read_statistics
from pipeline.sources.source import LABEL, SPLIT, Piece, Source
from pipeline.spill import write_spill, write_table
from pipeline.statistics import Moments, SplitRule, make_vocabulary, vocabulary_fingerprint

P = ParamSpec("P")
T = TypeVar("T")

EVENTS_PER_SHARD: Final = 1 << 21
READ_BY_TRAINING: Final = (INDEX_FILE, VOCABULARY_FILE, EMBEDDINGS_FILE)
NAMED_PATIENTS: Final = 100
"""How many of the patients without events the summary names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What decides the output besides the source.

    Attributes:
        rule: how patients are split where the source does not say.
        events_per_shard: about how many events a partition has; its splits share them.
    """

    rule: SplitRule = field(default_factory=SplitRule)
    events_per_shard: int = EVENTS_PER_SHARD


class Progress(Protocol):
    """Told of work as it ends; from any thread."""

    def __call__(self, stage: str, *, done: int, total: int, rows: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Spilled:
    """What spilling a piece found: its rows, how many were kept, the others by reason, and the columns it keeps."""

    num_rows: int
    num_kept: int
    rejects: dict[str, int]
    columns: dict[str, str]


def build(
    source: Source,
    output: Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prepare ``source`` into the data directory ``output``; returns the summary.

    Raises:
        UserError: the input cannot be used as a whole, or the output folder not at all; nothing new is left in it.
    """
    started = time.monotonic()
    rule = options.rule
    pieces = source.pieces()
    with output_folder(output, overwrite=overwrite) as work:
        data = work / "data"
        for name in ("spills", "sorted", "rejects", "duplicates"):
            (work / name).mkdir()
        labels_from, num_labels = _write_facts(source, rule, work)
        with _executor(min(workers, len(pieces))) as executor:
            run = Stages(executor, progress)

            spill_tasks = [(source, piece, number, rule, work) for number, piece in enumerate(pieces)]
            spilled = run("read", spill_piece, spill_tasks, lambda piece: piece.num_rows)
            _check_alike(pieces, spilled)

            num_kept = sum(piece.num_kept for piece in spilled)
            num_partitions = max(1, -(-num_kept // options.events_per_shard))
            sort_tasks = [(work, len(pieces), number, num_partitions, rule) for number in range(num_partitions)]
            parts = run("sort", sort_partition, sort_tasks, lambda part: part.num_events)
            if num_labels and not any(part.num_labels for part in parts):
                raise UserError(f"{labels_from}: names no patient of the input; give the labels of these patients")

            statistics_file = source.statistics()
            given = {} if statistics_file is None else read_statistics(statistics_file)
            train = Moments.merge([part.train for part in parts])
            if not train.count.any():
                raise UserError("the train split has no events; look at --split_fractions, and at the input's columns")
            vocabulary = make_vocabulary(train, given)
            embedding_dim = _write_embeddings(source, vocabulary, data)  # before the long work: it may refuse

            write_tasks = [(work, data, number, vocabulary) for number in range(num_partitions)]
            written = run("write", write_partition, write_tasks, lambda part: part.num_events)

        resolved = _resolved(source, options)
        fingerprint = _fingerprint(source, resolved)
        counts = _finish(work, data, written, vocabulary)
        events_in = sum(piece.num_rows for piece in spilled)
        rejects = sum((Counter(piece.rejects) for piece in spilled), Counter[str]())
        if counts["events_written"] < num_kept:
            rejects[DUPLICATE] = num_kept - counts["events_written"]
        assert events_in == counts["events_written"] + rejects.total(), "every row is written or rejected"
        without_events = sorted(patient for part in parts for patient in part.without_events)
        seconds = time.monotonic() - started
        summary = {
            **counts,
            "events_in": events_in,
            "rejects": dict(sorted(rejects.items())),
            "unknown_variable_events": sum(part.num_unknown for part in written),
            "patients_without_events": len(without_events),
            "patients_without_events_first": without_events[:NAMED_PATIENTS],
            "labels_without_patient": num_labels - sum(part.num_labels for part in parts),
            "variables": vocabulary.num_rows - FIRST_CODE,
            "variables_with_given_statistics": sum(name in given for name in vocabulary["variable"].to_pylist()),
            "format": source.name,
            "labels_from": labels_from and Path(labels_from).name,
            "seconds": round(seconds, 3),
            "events_per_second": round(events_in / seconds),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_atomically(data / SUMMARY_FILE, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())

        Manifest(
            splits={split: [part.shards[split] for part in written if split in part.shards] for split in SPLITS},
            files={name: file_sha256(data / name) for name in READ_BY_TRAINING if (data / name).exists()},
            vocabulary_fingerprint=vocabulary_fingerprint(vocabulary),
            num_codes=vocabulary.num_rows,
            embedding_dim=embedding_dim,
            options=resolved,
            fingerprint=fingerprint,
        ).save(data)
    return summary


# ---------------------------------------------------------------------------------------------- tasks


def spill_piece(source: Source, piece: Piece, number: int, rule: SplitRule, work: Path) -> Spilled:
    """Read and clean a piece; its kept rows go to ``spills/``, the others to ``rejects/``."""
    raw = source.read(piece)
    kept, rejected = clean(raw)
    seen = pl.concat([kept[PATIENT_ID], rejected[PATIENT_ID]]).unique().drop_nulls()
    patients = [*seen.filter(seen.str.strip_chars() != ""), *raw.patients]
    write_spill(work / "spills", number, kept, piece.files, patients, rule)
    if rejected.height:
        files = pl.Series(piece.files, dtype=pl.String)
        named = rejected.with_columns(files.gather(rejected["file"]).alias("file")).select(REJECTS_SCHEMA.names)
        pq.write_table(named.to_arrow().cast(REJECTS_SCHEMA), work / "rejects" / f"{number:05d}.parquet")
    return Spilled(
        num_rows=raw.rows.height,
        num_kept=kept.height,
        rejects=dict(rejected["reason"].value_counts().iter_rows()),
        columns={name: str(dtype) for name, dtype in kept.schema.items()},
    )


class InlineExecutor(Executor):
    """Runs a task when it is submitted, in this process."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _executor(workers: int) -> Executor:
    """Processes with a thread each; one alone works here, with all threads."""
    if workers == 1:
        return InlineExecutor()
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_use_one_thread)


def _use_one_thread() -> None:
    os.environ["POLARS_MAX_THREADS"] = "1"  # read when Polars first works, not when it is imported
    pa.set_cpu_count(1)


@dataclass(frozen=True, slots=True)
class Stages:
    """Runs the tasks of a stage on the executor, and tells how far it is."""

    executor: Executor
    progress: Progress | None

    def __call__(
        self, stage: str, task: Callable[..., T], arguments: Sequence[tuple[Any, ...]], size: Callable[[T], int]
    ) -> list[T]:
        """The results in the order of ``arguments``; the first failure ends the stage."""
        done = rows = 0
        if self.progress is not None:
            self.progress(stage, done=0, total=len(arguments), rows=0)

        def tell(future: Future[T]) -> None:
            nonlocal done, rows
            if self.progress is not None and not future.cancelled() and future.exception() is None:
                done, rows = done + 1, rows + size(future.result())
                self.progress(stage, done=done, total=len(arguments), rows=rows)

        futures = []
        try:
            for given in arguments:
                futures.append(self.executor.submit(task, *given))
                futures[-1].add_done_callback(tell)
            return [future.result() for future in futures]
        except BrokenExecutor:
            raise UserError(
                f"a worker process was killed while it did {stage!r}, most likely for want of memory; "
                "use fewer --workers or a smaller --events_per_shard"
            ) from None
        finally:
            for future in futures:
                future.cancel()


# ---------------------------------------------------------------------------------------------- between stages


def _write_facts(source: Source, rule: SplitRule, work: Path) -> tuple[str | None, int]:
    """What is known of patients besides their events, sorted by hash like the spills, to ``facts.arrow``.

    Returns:
        Where the labels come from, and how many patients they name.
    """
    schema = {PATIENT_ID: pl.String, LABEL: pl.Int8}
    labels_from, labels = source.labels() or (None, pl.DataFrame(schema=schema))
    splits = source.splits()
    if splits is None:
        splits = pl.DataFrame(schema={PATIENT_ID: pl.String, SPLIT: pl.String})
    facts = labels.with_columns(in_labels=True).join(splits, on=PATIENT_ID, how="full", coalesce=True)
    facts = facts.with_columns(
        pl.col("in_labels").fill_null(False),
        pl.col(SPLIT).replace_strict(list(SPLITS), range(len(SPLITS)), return_dtype=pl.Int8),
        pl.Series("hash", rule.hashes(facts[PATIENT_ID].to_list())[0]),
    )
    write_table(work / "facts.arrow", facts.sort("hash").to_arrow())
    return labels_from, labels.height


def _check_alike(pieces: Sequence[Piece], spilled: Sequence[Spilled]) -> None:
    for piece, result in zip(pieces, spilled, strict=True):
        if result.columns != spilled[0].columns:
            raise UserError(
                f"{piece.files[0]} gives {result.columns}, {pieces[0].files[0]} gives {spilled[0].columns}; "
                "give minutes in all files or dates in all, and set indices in all or in none"
            )


def _write_embeddings(source: Source, vocabulary: pa.Table, data: Path) -> int | None:
    path = source.embeddings()
    if path is None:
        return None
    vectors = read_embeddings(path, vocabulary["variable"].to_pylist())
    np.save(data / EMBEDDINGS_FILE, vectors)
    sync(data / EMBEDDINGS_FILE)
    return vectors.shape[1]


def _finish(work: Path, data: Path, written: Sequence[WrittenPartition], vocabulary: pa.Table) -> dict[str, Any]:
    """Write index, vocabulary and rejects; the counts of what is in the shards."""
    index = pa.concat_tables(part.index[split] for split in SPLITS for part in written if split in part.index)
    _write_parquet(data / INDEX_FILE, index.schema, [index])
    _write_parquet(data / VOCABULARY_FILE, vocabulary.schema, [vocabulary])
    rejects = [*sorted((work / "rejects").iterdir()), *sorted((work / "duplicates").iterdir())]
    _write_parquet(data / REJECTS_FILE, REJECTS_SCHEMA, (pq.ParquetFile(path).read() for path in rejects))
    counts = {}
    for split in SPLITS:
        patients = index.filter(pc.equal(index["split"], split))
        counts[split] = {
            "patients": patients.num_rows,
            "sets": pc.sum(patients["num_sets"], min_count=0).as_py(),
            "events": pc.sum(patients["num_events"], min_count=0).as_py(),
            "labelled": patients.num_rows - patients["label"].null_count,
            "positive": pc.sum(patients["label"], min_count=0).as_py(),
        }
    totals = {name: sum(counts[split][name] for split in SPLITS) for name in counts["train"]}
    return {
        "patients": totals["patients"],
        "sets": totals["sets"],
        "events_written": totals["events"],
        "unlabelled_patients": totals["patients"] - totals["labelled"],
        "splits": counts,
        "shards": sum(len(part.shards) for part in written),
    }


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    sync(path)


def _resolved(source: Source, options: BuildOptions) -> dict[str, Any]:
    """Everything that decides the output besides the input's content."""
    return {
        "format": source.name,
        **source.options,
        "split_fractions": list(options.rule.fractions),
        "split_seed": options.rule.seed,
        "events_per_shard": options.events_per_shard,
        "shard_format": "parquet",
    }


def _fingerprint(source: Source, resolved: dict[str, Any]) -> str:
    """sha256 over the options, and the names and the content of all files read."""
    inputs = source.inputs()
    with ThreadPoolExecutor() as threads:
        digests = sorted(zip((path.name for path in inputs), threads.map(file_sha256, inputs), strict=True))
    return hashlib.sha256(json.dumps([resolved, digests], sort_keys=True).encode()).hexdigest()
