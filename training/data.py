"""The data of a run: the shards that all ranks agree on, and batches prepared for a step before the step needs them.

Everything that a step needs and that can be known before it is made in the prefetch thread by :class:`BatchPreparer`:
event dropout, parts that fit the memory, layouts, summary features, noise keys, and the exact counts of the global
batch that losses are divided by.  The step takes the result, moves it in one copy and launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from model.losses import LossCounts
from model.prepared import PreparedBatch
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.shards import check_shards
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader, make_loader
from pipeline.loading.place import BatchPlace
from pipeline.options import check_section, option
from pipeline.sampling.groups import GROUP_EVENTS
from pipeline.sampling.policy import BUCKET_WIDTH
from pipeline.schema import FIRST_CODE, UserError
from pipeline.storage.cache import CACHE_BYTES, parse_bytes
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder
from training.augment import count_after_dropout, drop_events
from training.console import log_main
from training.memory import StepMemory
from training.metrics import BatchAmounts
from training.parallel import World

DEFAULT_BATCH_SIZE = 16
MIN_STEPS = 50
"""Steps an epoch that ``--batch_size auto`` leaves: fewer would train another model, not the same one faster."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data and batches."""

    data_dir: str = option("", "Data set made by preprocess.py: a folder, or a URL such as s3://bucket/prefix.")
    cache_dir: str | None = option(None, "Folder in which files of a URL are cached: a new folder or an older cache.")
    cache_bytes: str = option(
        CACHE_BYTES, "Maximum size of the shard cache, e.g. 8GB. Least recently used shards are evicted."
    )
    on_bad_shard: Literal["fail", "quarantine"] = option(
        "fail", "Stop at a missing or damaged shard, or check all shards first and leave out the patients of bad ones."
    )
    batch_size: int | Literal["auto"] = option(
        DEFAULT_BATCH_SIZE,
        "Number of patients in a global batch, over all devices; auto = the largest power of two that fits the memory "
        f"and leaves at least {MIN_STEPS} steps an epoch.",
        minimum=1,
    )
    max_events: int | None = option(None, "Maximum number of events in a global batch.", minimum=1)
    max_sequence_length: int | None = option(None, "Maximum number of events kept of each patient.", minimum=1)
    truncate: Literal["earliest", "latest", "random"] = option(
        "earliest", "Which events of a patient longer than --max_sequence_length are kept."
    )
    bucketing: bool = option(True, "Batch patients of similar length together.")
    bucket_width: float = option(
        BUCKET_WIDTH,
        "How far apart in length, counted in batches, two patients of a batch may be: less pads less, more mixes more.",
        minimum=0,
    )
    use_dynamic_padding: bool | None = option(
        None,
        "Send batches through the padded layout, each padded to its longest patient (or, with --no-…, all to the "
        "longest of all). Without the flag batches stay ragged and nothing is padded; the results are the same.",
    )
    group_events: int = option(
        GROUP_EVENTS, "Number of events of a split that are read and mixed together; two such groups are in memory.",
        minimum=1,
    )  # fmt: skip
    prefetch: int = option(4, "Number of batches prepared ahead of the step by a thread; 0 = none.", minimum=0)
    event_dropout: float = option(
        0.3, "Mean share of a patient's events left out of a training step, other ones at each step.",
        minimum=0, maximum=0.5,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_section(self)
        parse_bytes(self.cache_bytes)

    def open_folder(self) -> Folder:
        """Return the folder of the data set, at a path or behind a cache."""
        return open_folder(self.data_dir, cache_dir=self.cache_dir, cache_bytes=self.cache_bytes)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The data set of a run: the same shards on every rank.

    Attributes:
        options: where the data is and how it is batched.
        folder: the folder with its files.
        manifest: of the shards that are used.
        quarantined: the shards that are left out because they are bad somewhere, by split.
    """

    options: DataOptions
    folder: Folder
    manifest: Manifest
    quarantined: dict[str, list[ShardEntry]]

    @property
    def quarantined_shards(self) -> list[str]:
        return sorted(entry.path for entries in self.quarantined.values() for entry in entries)

    @property
    def quarantined_patients(self) -> dict[str, int]:
        return {split: sum(entry.num_patients for entry in entries) for split, entries in self.quarantined.items()}

    @property
    def num_patients(self) -> dict[str, int]:
        """Number of patients of each split that are used."""
        return {split: sum(entry.num_patients for entry in shards) for split, shards in self.manifest.splits.items()}

    def describe(self) -> str:
        """Return the patients of each split and the number of variables in one line."""
        counts = [f"{patients:,} {split}" for split, patients in self.num_patients.items()]
        return f"patients: {', '.join(counts)}; {self.manifest.num_codes - FIRST_CODE} variables"

    def open_loader(
        self,
        split: str,
        *,
        seed: int,
        shuffle: bool,
        world: World,
        memory: StepMemory | None = None,
        transform: Callable[[PatientBatch, BatchPlace], Any] | None = None,
        **changes: Any,
    ) -> PatientLoader:
        """Return a loader over a split, batched as the options say and within the memory of a step.

        Args:
            split: ``train``, ``valid`` or ``test``.
            seed: of the plan and of random truncation.
            shuffle: new batches in a new order every epoch.
            world: which ranks share the batches.
            memory: what a step may take; None = batches have no budget of memory.
            transform: makes, in the prefetch thread, what the loader hands out.
            changes: options of the loader that differ from the run's.
        """
        options = self.options
        size = DEFAULT_BATCH_SIZE if options.batch_size == "auto" else options.batch_size
        settings: dict[str, Any] = {
            "batch_size": memory.batch_size if memory else size,
            "max_events": options.max_events,
            "max_cost": memory.batch_bytes if memory else None,
            "budget": memory.peak if memory else None,
            "max_sequence_length": options.max_sequence_length,
            "truncate": options.truncate,
            "shuffle": shuffle,
            "seed": seed,
            "bucketing": options.bucketing,
            "bucket_width": options.bucket_width,
            "group_events": options.group_events,
            "prefetch": options.prefetch,
        }
        return make_loader(
            self.folder,
            manifest=self.manifest,
            quarantined=self.quarantined_shards,
            split=split,
            rank=world.rank,
            world_size=world.size,
            transform=transform,
            **(settings | changes),
        )


def agree_on_data(options: DataOptions, manifest: Manifest, world: World, *splits: str) -> DataSet:
    """Return the data set that all ranks use, without the shards of ``splits`` that are bad on any machine.

    Plans are made of the shards that there are, so all ranks must know of all bad ones before they plan.  Machines may
    hold copies of a data set: each checks all shards, and what is bad on one is left out by all.

    Raises:
        UserError: ranks have different data sets.
    """
    folder, found = options.open_folder(), dict[str, str]()
    if options.on_bad_shard == "quarantine":
        entries = [entry for split in splits for entry in manifest.splits.get(split, [])]
        found = check_shards(folder, entries[world.local_rank :: world.local_size])
    answers = world.gather((manifest.fingerprint, found))
    if any(fingerprint != manifest.fingerprint for fingerprint, _ in answers):
        raise UserError(f"--data_dir {folder}: not the same data set on all machines; copy it anew, or start again")
    bad = {path: reason for _, answer in answers for path, reason in answer.items()}
    quarantined = {
        split: [entry for entry in entries if entry.path in bad] for split, entries in manifest.splits.items()
    }
    for split, entries in quarantined.items():
        for entry in entries:
            left_out = f"its {entry.num_patients:,} {split} patients are left out"
            log_main(world, f"warning: {folder}/{entry.path}: {bad[entry.path]}; {left_out}")
    return DataSet(options=options, folder=folder, manifest=manifest.without(bad), quarantined=quarantined)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyBatch:
    """One rank's share of a global batch, ready for a step.

    Attributes:
        parts: the share as prepared batches that fit the memory one after another; mostly one.
        batch: the share after event dropout, on the CPU.
        counts: of the global batch after event dropout: what losses are divided by.
        amounts: of the share before event dropout: what throughput counts.
    """

    parts: list[PreparedBatch]
    batch: PatientBatch
    counts: LossCounts
    amounts: BatchAmounts


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPreparer:
    """Makes a :class:`ReadyBatch` of a batch, in the prefetch thread.

    Attributes:
        seed: of event dropout and of the model's noise; None = neither, as in validation.
        event_dropout: mean share of events left out.
        pad_to: columns of the padded layout; None = the longest patient of the batch.
        padded: whether batches go through the padded layout.
        memory: what a step may take; None = batches are not divided.
        pin: whether each part is packed into one page-locked buffer, for one copy to a GPU.
    """

    seed: int | None
    event_dropout: float = 0.0
    padded: bool = False
    pad_to: int | None = None
    memory: StepMemory | None = None
    pin: bool = False

    def __call__(self, batch: PatientBatch, place: BatchPlace) -> ReadyBatch:
        seen = batch
        if self.padded:
            seen = PatientBatch.from_padded(batch.to_padded(pad_to=self.pad_to), batch.patient_id)
        counts = LossCounts(
            num_events=place.counts.num_events,
            num_sets=place.counts.num_sets,
            num_labelled=place.counts.num_labelled,
        )
        if self.seed is not None and self.event_dropout:
            seen = drop_events(seen, self.event_dropout, seed=self.seed, step=place.step)
            if seen.num_patients == place.counts.num_patients:  # no other rank has a share
                counts = dataclasses.replace(counts, num_events=seen.num_events, num_sets=seen.num_sets)
            else:
                counts = count_after_dropout(place, self.event_dropout, seed=self.seed)
        parts = self.memory.split(seen) if self.memory else [seen]
        return ReadyBatch(
            parts=[self.prepare(part, place.step) for part in parts],
            batch=seen,
            counts=counts,
            amounts=BatchAmounts.of(batch, pad_to=self.pad_to),
        )

    def prepare(self, batch: PatientBatch, step: int) -> PreparedBatch:
        """Return what the model takes of one part of a batch at training step ``step``."""
        prepared = PreparedBatch.build(batch, seed=self.seed, step=step)
        return prepared.pack(pin=True) if self.pin else prepared
