"""The stages of preparing an input, and what is decided between them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import pyarrow as pa

from pipeline.dataset.schemas import SHARD_SUFFIXES
from pipeline.prepare.arrow_files import write_table
from pipeline.prepare.clean import describe_reasons
from pipeline.prepare.executors import ExecutionOptions, open_executor
from pipeline.prepare.gather import MEASURED, MOMENTS, SCALES, gather_all
from pipeline.prepare.journal import IsUsedUp, Stage, StageRunner, is_cleared, is_needed
from pipeline.prepare.known_splits import write_known_splits
from pipeline.prepare.merge import MAX_SPILLS, MergedSpills, group_spills, merge_spills, name_merged
from pipeline.prepare.moments import Moments
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.rules import Limits, compute_outlier_limits
from pipeline.prepare.scales import load_scales
from pipeline.prepare.sort import (
    LIMITS,
    SPILL_LIST,
    MeasuredPartition,
    Partition,
    SortedPartition,
    measure_partition,
    sort_partition,
)
from pipeline.prepare.sources.reading import Piece
from pipeline.prepare.sources.side_files import read_embeddings, read_statistics
from pipeline.prepare.sources.source import Source
from pipeline.prepare.spill import SpilledPiece, check_same_columns, list_spills, spill_piece
from pipeline.prepare.summary import Results, join_rejects
from pipeline.prepare.vocabulary import make_vocabulary
from pipeline.prepare.write import VOCABULARY, WrittenPartition, write_partition
from pipeline.schema import EMBEDDINGS_FILE, FIRST_CODE, MINUTE, UserError
from pipeline.storage.files import sync, write_atomically


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of one build, and what is decided between them."""

    runner: StageRunner
    source: Source
    pieces: Sequence[Piece]
    options: BuildOptions

    def run(self, execution: ExecutionOptions) -> Results:
        given = None if self.options.reference else self.source.find_splits()
        write_known_splits(given, self.options, self.runner.work)
        spilled = self.read_pieces()
        total = self._count_partitions(spilled)
        if len(self.pieces) >= min(execution.workers, total):
            return self._sort_and_write(spilled, total)
        with open_executor(execution, max_workers=total) as executor:  # few pieces, such as a packed file, become many
            return replace(self, runner=replace(self.runner, executor=executor))._sort_and_write(spilled, total)

    def _sort_and_write(self, spilled: list[SpilledPiece], total: int) -> Results:
        """Return the results of all stages; ``total`` partitions are cut from the spills."""
        work, rule, origin = self.runner.work, self.options.split_rule, self.source.origin
        spills = self.merge_spills(list_spills(spilled), total)
        write_atomically(work / SPILL_LIST, json.dumps(spills).encode())
        partitions = [Partition(work, number, total, rule, origin) for number in range(total)]
        limits = self.compute_limits(partitions)
        write_atomically(work / LIMITS, json.dumps(limits).encode())
        parts = self.sort_partitions(partitions)
        path = self.source.find_side_files().get("statistics")
        statistics = read_statistics(path) if path and not self.options.reference else {}
        moments = Moments.load(gather_all(self.runner, MOMENTS, total))
        scales = load_scales(gather_all(self.runner, SCALES, len(spilled)))
        vocabulary = self.make_vocabulary(moments, statistics, limits)
        embedding_dim = self.write_embeddings(vocabulary)  # before the long work: it may refuse
        written = self.write_partitions(total, vocabulary)
        return Results(spilled, parts, written, moments, scales, vocabulary, statistics, embedding_dim)

    def read_pieces(self) -> list[SpilledPiece]:
        leaves = ("spills/{:05d}.*.columns", "rejects/{:05d}.*.parquet", f"{SCALES}/{{:05d}}.*")
        stage = Stage("read", spill_piece, SpilledPiece, attrgetter("num_rows"), leaves)

        def find_used_up(spilled: list[SpilledPiece]) -> IsUsedUp:
            if self._is_sorted(self._count_partitions(spilled)):
                return is_cleared
            groups = enumerate(group_spills(list_spills(spilled), MAX_SPILLS))
            return {name for at, group in groups if self.runner.is_done("merge", at) for name in group}.__contains__

        tasks = [(self.source, piece, at, self.options, self.runner.work) for at, piece in enumerate(self.pieces)]
        names = {number: f" ({', '.join(piece.files[:3])})" for number, piece in enumerate(self.pieces)}
        spilled = self.runner.run(stage, tasks, find_used_up, names=names)
        self._check_pieces(spilled)
        return spilled

    def _is_sorted(self, num_partitions: int) -> bool:
        """Return whether an earlier run has done all that needs spills."""
        stages = [["sort", "write"], ["measure"]] if self._measures_outliers else [["sort", "write"]]
        return all(self.runner.are_done(names, num_partitions) for names in stages)

    def merge_spills(self, spills: Sequence[str], num_partitions: int) -> tuple[str, ...]:
        """Merge spills where there are too many, and remove those that are merged; return what is left, in order."""
        work, groups = self.runner.work, group_spills(spills, MAX_SPILLS)

        def clear(number: int) -> None:
            for name in groups[number]:
                (work / name).unlink(missing_ok=True)

        stage = Stage("merge", merge_spills, MergedSpills, attrgetter("num_rows"), ("merged/{:05d}.columns",))
        if groups:
            tasks = [(work, number, group) for number, group in enumerate(groups)]
            self.runner.run(stage, tasks, lambda _: is_cleared if self._is_sorted(num_partitions) else is_needed, clear)
        merged = [name_merged(number) for number in range(len(groups))]
        return (*merged, *spills[sum(map(len, groups)) :])

    def _check_pieces(self, spilled: Sequence[SpilledPiece]) -> None:
        """Raise UserError where files differ in their columns, or no row of the input can be used."""
        kept = [(piece, result) for piece, result in zip(self.pieces, spilled, strict=True) if result.num_kept]
        timed = next((pair for pair in kept if MINUTE in pair[1].columns), None)
        for piece, result in kept:
            first, expected = timed or kept[0]
            check_same_columns(piece.files[0], result.columns, first.files[0], expected.columns)
        rejects = sum((Counter(result.rejects) for result in spilled), Counter[str]())
        if not kept and rejects:
            examples = {reason: text for result in reversed(spilled) for reason, text in result.examples.items()}
            reasons = describe_reasons(rejects, examples)
            raise UserError(f"{self.source.path}: no row can be used: {reasons}; mend these columns, or name others")

    def _count_partitions(self, spilled: Sequence[SpilledPiece]) -> int:
        return max(1, -(-sum(piece.num_kept for piece in spilled) // self.options.events_per_shard))

    @property
    def _measures_outliers(self) -> bool:
        return self.options.rules.outlier_std is not None and self.options.reference is None

    def compute_limits(self, partitions: Sequence[Partition]) -> Limits:
        """Return the outlier limits (low, high) by variable; none without ``--outlier_std``."""
        if not self._measures_outliers:
            return self.options.reference.limits if self.options.reference else {}
        leaves = (f"{MEASURED}/{{:05d}}.*",)
        stage = Stage("measure", measure_partition, MeasuredPartition, attrgetter("num_events"), leaves)
        self.runner.run(stage, [(partition,) for partition in partitions])
        measured = Moments.load(gather_all(self.runner, MEASURED, len(partitions)))
        return compute_outlier_limits(measured, self.options.rules)

    def sort_partitions(self, partitions: Sequence[Partition]) -> list[SortedPartition]:
        leaves = ("sorted/{:05d}.arrow", "late_rejects/{:05d}.parquet", f"{MOMENTS}/{{:05d}}.*")
        stage = Stage("sort", sort_partition, SortedPartition, attrgetter("num_events"), leaves)
        tasks = [(partition, self.options.rules) for partition in partitions]

        def find_used_up(parts: list[SortedPartition]) -> IsUsedUp:
            return is_cleared if self.runner.are_done(["write"], len(parts)) else is_needed

        parts = self.runner.run(stage, tasks, find_used_up)
        for name in ("spills", "merged"):
            shutil.rmtree(self.runner.work / name)
        return parts

    def make_vocabulary(
        self, moments: Moments, statistics: Mapping[str, tuple[float, float]], limits: Limits
    ) -> pa.Table:
        if self.options.reference is not None:
            if not moments.everywhere.any():
                raise UserError("the input has no event that can be used; look at its columns")
            return self.options.reference.vocabulary
        min_count = self.options.rules.min_count
        if not moments.num_events:
            raise UserError("the train split has no events; look at --split_fractions, and at the input's columns")
        vocabulary = make_vocabulary(moments, statistics, min_count, limits, self.source.read_descriptions())
        if vocabulary.num_rows == FIRST_CODE:
            raise UserError(f"--min_count {min_count}: no variable has as many events in the train split; lower it")
        return vocabulary

    def write_embeddings(self, vocabulary: pa.Table) -> int | None:
        """Write the embeddings of the vocabulary, if there are some, and return their width."""
        target = self.runner.work / "data" / EMBEDDINGS_FILE
        if self.options.reference is not None:
            return self.options.reference.copy_embeddings(target)
        path = self.source.find_side_files()["embeddings"]
        if path is None:
            return None
        vectors = read_embeddings(path, vocabulary["variable"].to_pylist())
        np.save(target, vectors)
        sync(target)
        return vectors.shape[1]

    def write_partitions(self, num_partitions: int, vocabulary: pa.Table) -> list[WrittenPartition]:
        leaves = ("index/*-{:05d}.arrow", "data/*/{:05d}.*")
        stage = Stage("write", write_partition, WrittenPartition, attrgetter("num_events"), leaves)
        suffixes = SHARD_SUFFIXES[self.options.shard_format]
        write_table(self.runner.work / VOCABULARY, vocabulary)
        tasks = [(self.runner.work, number, suffixes) for number in range(num_partitions)]
        with ThreadPoolExecutor(1) as thread:  # which would do nothing but wait for workers
            joining = thread.submit(join_rejects, self.runner.work)
            written = self.runner.run(stage, tasks)
            joining.result()
        shutil.rmtree(self.runner.work / "sorted")
        return written
