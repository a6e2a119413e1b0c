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
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SUFFIXES
from pipeline.dataset.tables import open_checked
from pipeline.machine import peak_rss_bytes
from pipeline.prepare.clean import REJECTS_SCHEMA, clean, is_blank
from pipeline.prepare.executors import LOCAL, open_executor
from pipeline.prepare.journal import JOURNAL, Progress, Stages
from pipeline.prepare.like import Like
from pipeline.prepare.moments import Moments
from pipeline.prepare.partition import (
    SortedPartition,
    WrittenPartition,
    measure_partition,
    sort_partition,
    write_partition,
)
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.publish import output_folder
from pipeline.prepare.rules import Limits, Rules, apply_ranges, outlier_limits
from pipeline.prepare.sources.side_files import read_embeddings, read_statistics
from pipeline.prepare.sources.source import LABEL, SPLIT, SUBJECT, Piece, Source, unreadable
from pipeline.prepare.spill import read_table, write_spill, write_table
from pipeline.prepare.splits import SplitRule
from pipeline.prepare.vocabulary import make_vocabulary, vocabulary_fingerprint
from pipeline.schema import (
    EMBEDDINGS_FILE,
    FIRST_CODE,
    INDEX_FILE,
    PATIENT_ID,
    REJECTS_FILE,
    SPLITS,
    SUMMARY_FILE,
    VARIABLE,
    VOCABULARY_FILE,
    UserError,
)
from pipeline.storage.files import file_sha256, replace_atomically, seal, sync, unseal, write_atomically

EVENTS_PER_SHARD: Final = 1 << 21
READ_BY_TRAINING: Final = (INDEX_FILE, VOCABULARY_FILE, EMBEDDINGS_FILE)
WORK_BYTES: Final = {".parquet": 4.0, ".gz": 6.0}
"""Bytes that the work takes on disk, at the least, for each byte of input; where it is plain text, one.

A row takes 28 in the spills and 10 sorted; it comes as about 5 of compressed Parquet, or 20 to 40 of text.
"""

NAMED_PATIENTS: Final = 100
"""How many of the patients without events the summary names."""
NAMED_UNKNOWN: Final = 100
"""How many of the unknown variables, the most frequent, the summary names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What decides the output besides the source.

    Attributes:
        rule: how patients are split where the source does not say.
        rules: which events count.
        pseudonyms: what patients are called instead of their ids.
        like: the data set whose vocabulary and statistics are used, instead of what the source gives, splits included.
        events_per_shard: about how many events a partition has; its splits share them.
        shard_format: a key of ``SHARD_SUFFIXES``.
    """

    rule: SplitRule = field(default_factory=SplitRule)
    rules: Rules = field(default_factory=Rules)
    pseudonyms: Pseudonyms | None = None
    like: Like | None = None
    events_per_shard: int = EVENTS_PER_SHARD
    shard_format: str = "parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spilled:
    """What spilling a piece found.

    Attributes:
        num_rows: rows read.
        num_source_rows: rows of the files, fewer where one row serves several patients.
        num_kept: rows spilled.
        num_clipped: values that a rule changed.
        rejects: the others, by reason.
        columns: names and dtypes of what is kept, but for patients and variables.
    """

    num_rows: int
    num_source_rows: int
    num_kept: int
    num_clipped: int
    rejects: dict[str, int]
    columns: dict[str, str]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(**content)


def build(
    source: Source,
    output: Path,
    options: BuildOptions,
    *,
    executor: str = LOCAL,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prepare ``source`` into the data directory ``output``; returns the summary.

    A run that was stopped goes on where it was.  Where the output is there already, made of the same input and options,
    nothing is done but to return its summary.

    Args:
        source: the input.
        output: a new or an empty folder, or a data directory.
        options: with the source, what decides the output.
        executor: what runs the tasks, and ``workers`` of them; see :func:`pipeline.prepare.executors.open_executor`.
        workers: most processes of this machine.
        overwrite: replace a data set in ``output``.
        progress: told of tasks as they end.
        say: told, in a line, when a run does not begin from nothing.

    Raises:
        UserError: the input cannot be used as a whole, or the output folder not at all; nothing new is left in it.
    """
    started = time.monotonic()
    rule, rules, like = options.rule, options.rules, options.like
    measuring = rules.outlier_std is not None and like is None
    resolved = _resolved(source, options)
    pieces: list[Piece] = []

    def partitions_of(spilled: Sequence[Spilled]) -> int:
        return max(1, -(-sum(piece.num_kept for piece in spilled) // options.events_per_shard))

    def look_at_input() -> str:
        pieces.extend(source.pieces())
        return _fingerprint(source, resolved)

    with output_folder(output.absolute(), look_at_input, overwrite=overwrite, say=say) as claimed:
        if claimed is None:
            return _read_summary(output / SUMMARY_FILE)
        work, fingerprint = claimed
        if not (work / JOURNAL).exists():
            _check_space(source, output)
        data = work / "data"
        for name in ("spills", "sorted", "rejects", "late_rejects", "index", "data"):
            (work / name).mkdir(exist_ok=True)
        labels_from, num_labels = _write_facts(source, options, work)
        with open_executor(executor, min(workers, len(pieces))) as opened:
            run = Stages(opened, work, progress)

            def used_up(spilled: Sequence[Spilled]) -> bool:
                after = (["measure"], ["sort", "write"]) if measuring else (["sort", "write"],)
                return all(run.are_done(stages, partitions_of(spilled)) for stages in after)

            spill_tasks = [(source, piece, number, options, work) for number, piece in enumerate(pieces)]
            spilled = run(
                "read",
                spill_piece,
                spill_tasks,
                from_json=Spilled.from_json,
                size=lambda piece: piece.num_rows,
                leaves=("spills/{:05d}.*.arrow", "rejects/{:05d}.parquet"),
                used_up=used_up,
            )
            _check_alike(pieces, spilled)
            num_partitions = partitions_of(spilled)
            sort_tasks = [
                (work, len(pieces), number, num_partitions, rule, source.origin) for number in range(num_partitions)
            ]
            limits: Limits = {} if like is None else like.limits
            if measuring:
                measured = run(
                    "measure",
                    measure_partition,
                    sort_tasks,
                    from_json=Moments.from_json,
                    size=lambda moments: int(moments.count.sum()),
                )
                limits = outlier_limits(Moments.merge(measured), rules)
            parts = run(
                "sort",
                sort_partition,
                [(*task, rules, limits) for task in sort_tasks],
                from_json=SortedPartition.from_json,
                size=lambda part: part.num_events,
                leaves=("sorted/{:05d}.arrow", "late_rejects/{:05d}.parquet"),
                used_up=lambda parts: run.are_done(["write"], len(parts)),
            )
            shutil.rmtree(work / "spills")
            if num_labels and not any(part.num_labels for part in parts):
                raise UserError(f"{labels_from}: names no patient of the input; give the labels of these patients")

            statistics_file = source.statistics() if like is None else None
            given = {} if statistics_file is None else read_statistics(statistics_file)
            if like is None:
                train = Moments.merge([part.train for part in parts])
                vocabulary = _new_vocabulary(source, rules, train, given, limits)
                embedding_dim = _write_embeddings(source, vocabulary, data)  # before the long work: it may refuse
            else:
                vocabulary, embedding_dim = like.vocabulary, like.manifest.embedding_dim
                if not any(part.num_events for part in parts):
                    raise UserError("the input has no event that can be used; look at its columns")
                if embedding_dim is not None:
                    with open_checked(like.folder, like.manifest, EMBEDDINGS_FILE) as embeddings:
                        shutil.copyfile(embeddings, data / EMBEDDINGS_FILE)
                    sync(data / EMBEDDINGS_FILE)

            suffixes = SHARD_SUFFIXES[options.shard_format]
            write_tasks = [(work, data, number, vocabulary, suffixes) for number in range(num_partitions)]
            written = run(
                "write",
                write_partition,
                write_tasks,
                from_json=WrittenPartition.from_json,
                size=lambda part: part.num_events,
                leaves=("index/*-{:05d}.arrow", "data/*/{:05d}.*"),
            )
            shutil.rmtree(work / "sorted")

        counts = _finish(work, data, written, vocabulary)
        events_in = sum(piece.num_rows for piece in spilled)
        found = [*(piece.rejects for piece in spilled), *(part.rejects for part in parts)]
        rejects = sum(map(Counter, found), Counter[str]())
        assert events_in == counts["events_written"] + rejects.total(), "every row is written or rejected"
        unknown = sum((Counter(part.unknown) for part in written), Counter[str]())
        without_events = sorted(patient for part in parts for patient in part.without_events)
        seconds = time.monotonic() - started
        summary = {
            **counts,
            "source_rows": sum(piece.num_source_rows for piece in spilled),
            "events_in": events_in,
            "rejects": dict(sorted(rejects.items())),
            "clipped": {
                "out_of_range": sum(piece.num_clipped for piece in spilled),
                "outlier": sum(part.num_clipped for part in parts),
            },
            "ranges_of_unknown_variables": sorted(rules.ranges.keys() - set(vocabulary["variable"].to_pylist())),
            "unknown_variable_events": unknown.total(),
            "unknown_variables": dict(unknown.most_common(NAMED_UNKNOWN)),
            "patients_without_events": len(without_events),
            "patients_without_events_first": without_events[:NAMED_PATIENTS],
            "patients_split_by_hash": sum(part.num_split_by_hash for part in parts) if like is None else 0,
            "labels_without_patient": num_labels - sum(part.num_labels for part in parts),
            "variables": vocabulary.num_rows - FIRST_CODE,
            "variables_with_given_statistics": sum(name in given for name in vocabulary["variable"].to_pylist()),
            "format": source.name,
            "labels_from": labels_from and Path(labels_from).name,
            "seconds": round(seconds, 3),
            "events_per_second": round(events_in / seconds),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        summary = seal(summary)
        write_atomically(data / SUMMARY_FILE, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())

        splits, *tars = (
            {split: [part.shards[split][place] for part in written if split in part.shards] for split in SPLITS}
            for place in range(len(suffixes))
        )
        Manifest(
            splits=splits,
            tars=tars[0] if tars else {},
            files={name: file_sha256(data / name) for name in READ_BY_TRAINING if (data / name).exists()},
            vocabulary_fingerprint=vocabulary_fingerprint(vocabulary),
            num_codes=vocabulary.num_rows,
            embedding_dim=embedding_dim,
            options=resolved,
            fingerprint=fingerprint,
        ).save(data)
    return summary


def _read_summary(path: Path) -> dict[str, Any]:
    mend = "give --overwrite to make the data set again"
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: missing, or not as it was written; {mend}") from None
    unseal(summary, path, mend)
    return summary


# ---------------------------------------------------------------------------------------------- tasks


def spill_piece(source: Source, piece: Piece, number: int, options: BuildOptions, work: Path) -> Spilled:
    """Read and clean a piece; its kept rows go to ``spills/``, the others to ``rejects/``."""
    rules, pseudonyms, names = options.rules, options.pseudonyms, list(piece.files)
    raw = source.read(piece)
    kept, rejected = clean(raw)
    num_clipped = 0
    if rules.ranges:
        kept, outside, num_clipped = apply_ranges(kept, rules.ranges)
        rejected = pl.concat([rejected, outside])
    others = pl.Series(raw.patients, dtype=pl.String)
    if pseudonyms is not None:  # files are often named like patients
        kept, rejected, others = pseudonyms.of_kept(kept), pseudonyms.of_rejected(rejected), pseudonyms.of_names(others)
        names = [pseudonyms.of(name) for name in names]
    seen = pl.concat([frame[PATIENT_ID].unique().cast(pl.String) for frame in (kept, rejected)]).drop_nulls()
    patients = [*seen.filter(~is_blank(seen)), *others]
    write_spill(work / "spills", number, kept, names, patients, options.rule)
    if rejected.height:
        files = pl.Series(names, dtype=pl.String)
        named = rejected.with_columns(files.gather(rejected["file"]).alias("file")).select(REJECTS_SCHEMA.names)
        _write_parquet(
            work / "rejects" / f"{number:05d}.parquet", REJECTS_SCHEMA, [named.to_arrow().cast(REJECTS_SCHEMA)]
        )
    return Spilled(
        num_rows=raw.rows.height,
        num_source_rows=raw.rows.height if raw.num_source_rows is None else raw.num_source_rows,
        num_kept=kept.height,
        num_clipped=num_clipped,
        rejects=dict(rejected["reason"].value_counts().iter_rows()),
        columns={name: str(dtype) for name, dtype in kept.drop(PATIENT_ID, VARIABLE).schema.items()},
    )


# ---------------------------------------------------------------------------------------------- between stages


def _check_space(source: Source, output: Path) -> None:
    """Refuse at once what would fill the disk after hours; what is let pass may still do so, and can go on then."""
    needed = sum(path.stat().st_size * WORK_BYTES.get(path.suffix, 1.0) for path in source.inputs())
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"{output}: the work needs at least {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} are free; "
            "free some, or name an --output on another disk"
        )


def _write_facts(source: Source, options: BuildOptions, work: Path) -> tuple[str | None, int]:
    """What is known of patients besides their events, sorted by hash like the spills, to ``facts.arrow``.

    Returns:
        Where the labels come from, and how many patients they name.
    """
    schema = {PATIENT_ID: pl.String, LABEL: pl.Int8}
    labels_from, labels = source.labels() or (None, pl.DataFrame(schema=schema))
    splits = source.splits() if options.like is None else None
    if splits is None:
        splits = pl.DataFrame(schema={PATIENT_ID: pl.String, SPLIT: pl.String})
    if options.pseudonyms is not None:
        hidden = options.pseudonyms.of_names
        labels = labels.with_columns(hidden(labels[name]) for name in (PATIENT_ID, SUBJECT) if name in labels.columns)
        splits = splits.with_columns(hidden(splits[PATIENT_ID]))
    facts = labels.with_columns(in_labels=True).join(splits, on=PATIENT_ID, how="full", coalesce=True)
    subjects = pl.coalesce(SUBJECT, PATIENT_ID) if SUBJECT in facts.columns else pl.col(PATIENT_ID)
    by_hash = pl.Series(options.rule.split(facts.select(subjects).to_series().to_list()))
    facts = facts.select(
        PATIENT_ID,
        LABEL,
        pl.col("in_labels").fill_null(False),
        pl.col(SPLIT).is_null().alias("by_hash"),
        pl.col(SPLIT).replace_strict(list(SPLITS), range(len(SPLITS)), return_dtype=pl.Int8).fill_null(by_hash),
        pl.Series("hash", options.rule.hashes(facts[PATIENT_ID].to_list())[0]),
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


def _new_vocabulary(
    source: Source, rules: Rules, train: Moments, given: dict[str, tuple[float, float]], limits: Limits
) -> pa.Table:
    if not train.count.any():
        raise UserError("the train split has no events; look at --split_fractions, and at the input's columns")
    vocabulary = make_vocabulary(
        train, given, min_count=rules.min_count, limits=limits, descriptions=source.descriptions()
    )
    if vocabulary.num_rows == FIRST_CODE:
        raise UserError(f"--min_count {rules.min_count}: no variable has as many events in the train split; lower it")
    return vocabulary


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
    index_of = {
        split: [
            work / "index" / f"{split}-{number:05d}.arrow"
            for number, part in enumerate(written)
            if split in part.shards
        ]
        for split in SPLITS
    }
    _write_parquet(data / INDEX_FILE, INDEX_SCHEMA, map(read_table, chain.from_iterable(index_of.values())))
    _write_parquet(data / VOCABULARY_FILE, vocabulary.schema, [vocabulary])
    rejects = [path for name in ("rejects", "late_rejects") for path in sorted((work / name).glob("*.parquet"))]
    _write_parquet(data / REJECTS_FILE, REJECTS_SCHEMA, (pq.ParquetFile(path).read() for path in rejects))
    counts = {}
    for split in SPLITS:
        entries = [part.shards[split][0] for part in written if split in part.shards]
        labels = [read_table(path)["label"] for path in index_of[split]]
        counts[split] = {
            "patients": sum(entry.num_patients for entry in entries),
            "sets": sum(entry.num_sets for entry in entries),
            "events": sum(entry.num_events for entry in entries),
            "labelled": sum(len(label) - label.null_count for label in labels),
            "positive": sum(pc.sum(label, min_count=0).as_py() for label in labels),
        }
    totals = {name: sum(counts[split][name] for split in SPLITS) for name in counts["train"]}
    return {
        "patients": totals["patients"],
        "sets": totals["sets"],
        "events_written": totals["events"],
        "unlabelled_patients": totals["patients"] - totals["labelled"],
        "splits": counts,
        "shards": sum(len(entries) for part in written for entries in part.shards.values()),
    }


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    with replace_atomically(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _resolved(source: Source, options: BuildOptions) -> dict[str, Any]:
    """Everything that decides the output besides the input's content."""
    return {
        "format": source.name,
        **source.options,
        "split_fractions": list(options.rule.fractions),
        "split_seed": options.rule.seed,
        **options.rules.options,
        "pseudonym_key": options.pseudonyms and options.pseudonyms.fingerprint,
        "like": options.like and options.like.manifest.fingerprint,
        "events_per_shard": options.events_per_shard,
        "shard_format": options.shard_format,
    }


def _fingerprint(source: Source, resolved: dict[str, Any]) -> str:
    """sha256 over the options, and the names and the content of all files read."""
    inputs = source.inputs()
    with ThreadPoolExecutor() as threads:
        digests = sorted(zip((path.name for path in inputs), threads.map(_digest, inputs), strict=True))
    return hashlib.sha256(json.dumps([resolved, digests], sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise unreadable(path, error) from None
