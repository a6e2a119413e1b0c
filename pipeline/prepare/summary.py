"""Join what the tasks wrote to index, vocabulary, rejects, summary and manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SUFFIXES
from pipeline.dataset.tasks import Task
from pipeline.machine import peak_rss_bytes
from pipeline.prepare.arrow_files import load_table, write_parquet
from pipeline.prepare.clean import REJECTS_SCHEMA
from pipeline.prepare.moments import Moments
from pipeline.prepare.scales import Scale
from pipeline.prepare.sort import MAX_NAMED_PATIENTS, SortedPartition
from pipeline.prepare.spill import SpilledPiece
from pipeline.prepare.vocabulary import vocabulary_fingerprint
from pipeline.prepare.warn import find_warnings
from pipeline.prepare.write import WrittenPartition
from pipeline.schema import EMBEDDINGS_FILE, FIRST_CODE, INDEX_FILE, REJECTS_FILE, SPLITS, VOCABULARY_FILE, UserError
from pipeline.storage.files import seal, unseal, write_atomically
from pipeline.storage.pieces import checksum_file

READ_BY_TRAINING: Final = (INDEX_FILE, VOCABULARY_FILE, EMBEDDINGS_FILE)

MAX_NAMED_VARIABLES: Final = 100
"""Maximum number of unknown variables that the summary names, the most frequent first."""


@dataclass(frozen=True, slots=True)
class Results:
    """The results of all stages, and what was read besides events: ``statistics`` are mean and std by variable."""

    spilled: Sequence[SpilledPiece]
    parts: Sequence[SortedPartition]
    written: Sequence[WrittenPartition]
    moments: Moments
    scales: Sequence[Scale]
    vocabulary: pa.Table
    statistics: Mapping[str, tuple[float, float]]
    embedding_dim: int | None

    def join_tables(self, work: Path) -> dict[str, Any]:
        """Write index and vocabulary to ``data``; return counts of what is in the shards."""
        data, written = work / "data", list(enumerate(self.written))
        indexes = {
            split: [work / "index" / f"{split}-{number:05d}.arrow" for number, part in written if split in part.shards]
            for split in SPLITS
        }
        write_parquet(data / INDEX_FILE, INDEX_SCHEMA, map(load_table, chain.from_iterable(indexes.values())))
        write_parquet(data / VOCABULARY_FILE, self.vocabulary.schema, [self.vocabulary])
        counts = {}
        for split in SPLITS:
            entries = [part.shards[split][0] for part in self.written if split in part.shards]
            counts[split] = {name: _sum(entries, f"num_{name}") for name in ("patients", "sets", "events")}
        totals = {name: sum(counts[split][name] for split in SPLITS) for name in counts["train"]}
        return {
            "patients": totals["patients"],
            "sets": totals["sets"],
            "events_written": totals["events"],
            "splits": counts,
            "shards": sum(len(entries) for part in self.written for entries in part.shards.values()),
        }

    def summarise(
        self, counts: Mapping[str, Any], options: Mapping[str, Any], task: Task | None, seconds: float
    ) -> dict[str, Any]:
        """Return the summary, of the counts of :meth:`join_tables`, the options of the manifest and the first task."""
        events_in = _sum(self.spilled, "num_rows")
        rejected = [*(piece.rejects for piece in self.spilled), *(part.rejects for part in self.parts)]
        rejects = sum(map(Counter, rejected), Counter[str]())
        assert events_in == counts["events_written"] + rejects.total(), "every row is written or rejected"
        variables = self.vocabulary["variable"].to_pylist()
        unknown = Counter(dict(zip(self.moments.variables, self.moments.everywhere.tolist(), strict=True)))
        for variable in variables:
            del unknown[variable]
        without_events = sorted(patient for part in self.parts for patient in part.without_events)
        return {
            **counts,
            "events_in": events_in,
            "source_rows": _sum(self.spilled, "num_source_rows"),
            "rejects": dict(sorted(rejects.items())),
            "clipped": {"out_of_range": _sum(self.spilled, "num_clipped"), "outlier": _sum(self.parts, "num_clipped")},
            "ranges_of_unknown_variables": sorted(options["ranges"].keys() - set(variables)),
            "unknown_variable_events": unknown.total(),
            "unknown_variables": dict((+unknown).most_common(MAX_NAMED_VARIABLES)),
            "patients_without_events": _sum(self.parts, "num_without_events"),
            "patients_without_events_first": without_events[:MAX_NAMED_PATIENTS],
            "patients_split_by_hash": 0 if options["like"] else _sum(self.parts, "num_split_by_hash"),
            "labels_from": task and task.labels_from,
            "labels_without_patient": task.labels_without_patient if task else 0,
            "samples": {split: asdict(of_split) for split, of_split in task.splits.items()} if task else {},
            "variables": len(variables) - FIRST_CODE,
            "variables_with_given_statistics": sum(name in self.statistics for name in variables),
            "format": options["format"],
            "seconds": round(seconds, 3),
            "events_per_second": round(events_in / seconds),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def find_warnings(self, task: Task | None) -> list[str]:
        """Return warnings about variables, and about the labels of the first task."""
        return find_warnings(self.moments, task.splits if task else {}, self.scales)

    def make_manifest(self, data: Path, options: dict[str, Any], fingerprint: str) -> Manifest:
        """Return the manifest of the data directory ``data``, whose shards and tables are complete."""
        splits, *tars = (
            {split: [part.shards[split][number] for part in self.written if split in part.shards] for split in SPLITS}
            for number in range(len(SHARD_SUFFIXES[options["shard_format"]]))
        )
        read = {name: checksum_file(data / name) for name in READ_BY_TRAINING if (data / name).exists()}
        return Manifest(
            splits=splits,
            tars=tars[0] if tars else {},
            files={name: sha256 for name, (sha256, _) in read.items()},
            pieces={name: pieces for name, (_, pieces) in read.items() if pieces and name == INDEX_FILE},
            vocabulary_fingerprint=vocabulary_fingerprint(self.vocabulary),
            num_codes=self.vocabulary.num_rows,
            embedding_dim=self.embedding_dim,
            options=options,
            fingerprint=fingerprint,
        )


def join_rejects(work: Path) -> None:
    """Write the rejects of all tasks to ``data``, in the order of pieces and then of partitions."""
    paths = [path for name in ("rejects", "late_rejects") for path in sorted((work / name).glob("*.parquet"))]
    tables = (pq.ParquetFile(path).read() for path in paths)
    write_parquet(work / "data" / REJECTS_FILE, REJECTS_SCHEMA, tables)


def _sum(results: Sequence[object], name: str) -> int:
    return sum(getattr(result, name) for result in results)


def write_summary(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write a summary with a checksum, and return it as it is written."""
    summary = seal(summary)
    write_atomically(path, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return summary


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary in the file ``path``; raise UserError where it is missing or damaged."""
    advice = "give --overwrite to make the data set again"
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: missing, or not as it was written; {advice}") from None
    unseal(summary, path, advice)
    return summary
