"""The data of a run: the shards that all ranks agree on, and batches prepared for a step before the step needs them.

Everything that a step needs and that can be known before it is made in the prefetch thread by :class:`BatchPreparer`:
event dropout, parts that fit the memory, layouts, summary features, noise keys, and the exact counts of the global
batch that losses are divided by.  The step takes the result, moves it in one copy and launches.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from model.capacity import BatchShape
from model.config import Outcome
from model.losses import LossCounts
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from pipeline.dataset.joined import JoinedFolder
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.patients import ChosenPatients, SplitPart, split_by_shard
from pipeline.dataset.samples import SampleIndex
from pipeline.dataset.shards import check_shards
from pipeline.dataset.tasks import Task, common_times, load_tasks
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader, make_loader
from pipeline.loading.options import BatchOptions
from pipeline.loading.place import BatchPlace
from pipeline.options import check_section, option
from pipeline.schema import FIRST_CODE, UserError
from pipeline.storage.cache import CACHE_BYTES, parse_bytes
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder
from training.augment import count_after_dropout, drop_events
from training.console import log_main
from training.memory import StepMemory
from training.metrics import BatchAmounts
from training.parallel import World
from training.predictions import outcome_of
from training.targets import Teacher

DEFAULT_BATCH_SIZE = 16
SAMPLE_SALT = 0x5A3B1E
"""Seed of the order in which patients are sampled."""

MIN_STEPS = 50
"""Steps an epoch that ``--batch_size auto`` leaves: fewer would train another model, not the same one faster."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(BatchOptions):
    """Data and batches."""

    data_dir: str | tuple[str, ...] = option(
        "", "Data set made by preprocess.py: a folder, or a URL such as s3://bucket/prefix. Given several times, the "
        "data sets, prepared with --like the first, are used as one.",
    )  # fmt: skip
    task: str | None = option(
        None, "Task whose samples are used: what they predict, and when; or several to learn at once, as a,b,c. "
        "Default: the task named default, which preprocess.py makes; with --objective pretrain whole patients.",
    )  # fmt: skip
    cache_dir: str | None = option(None, "Folder in which files of a URL are cached: a new folder or an older cache.")
    cache_bytes: str = option(
        CACHE_BYTES, "Maximum size of the shard cache, e.g. 8GB. Least recently used shards are evicted."
    )
    on_bad_shard: Literal["fail", "quarantine"] = option(
        "fail", "Stop at a missing or damaged shard, or check all shards first and leave out the patients of bad ones."
    )
    batch_size: int | Literal["auto"] = option(
        DEFAULT_BATCH_SIZE, "Number of patients in a global batch, over all devices; auto = the largest power of two "
        f"that fits the memory and leaves at least {MIN_STEPS} steps an epoch.", minimum=1,
    )  # fmt: skip
    use_dynamic_padding: bool | None = option(
        None,
        "Send batches through the padded layout, each padded to its longest patient (or, with --no-…, all to the "
        "longest of all). Without the flag batches stay ragged and nothing is padded; the results are the same.",
    )
    prefetch: int = option(4, "Number of batches prepared ahead of the step by a thread; 0 = none.", minimum=0)
    prefetch_workers: int = option(
        0, "Number of processes that prepare batches for the training steps; 0 = the prefetch thread does it. A GPU "
        "that takes more than 3,000 patients a second needs some.", minimum=0,
    )  # fmt: skip
    event_dropout: float = option(
        0.3, "Mean share of a patient's events left out of a training step, other ones at each step.",
        minimum=0, maximum=0.5,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_section(self)
        parse_bytes(self.cache_bytes)

    def open_folder(self) -> Folder:
        """Return the folder of the data set, at a path or behind a cache."""
        names = (self.data_dir,) if isinstance(self.data_dir, str) else self.data_dir
        folders = [open_folder(name, cache_dir=self.cache_dir, cache_bytes=self.cache_bytes) for name in names]
        return folders[0] if len(folders) == 1 else JoinedFolder(folders)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The data set of a run: the same shards on every rank; some are ``quarantined``, by split, as they are bad.

    Without ``tasks`` a sample is a whole patient, who has no label.  Of a split that is in ``chosen`` those patients
    alone are used.
    """

    options: DataOptions
    folder: Folder
    manifest: Manifest
    tasks: tuple[Task, ...]
    quarantined: dict[str, list[ShardEntry]]
    chosen: Mapping[str, ChosenPatients] = dataclasses.field(default_factory=dict)

    @property
    def quarantined_shards(self) -> list[str]:
        return sorted(entry.path for entries in self.quarantined.values() for entry in entries)

    @property
    def quarantined_patients(self) -> dict[str, int]:
        return {split: sum(entry.num_patients for entry in entries) for split, entries in self.quarantined.items()}

    @property
    def num_samples(self) -> dict[str, int]:
        """Number of samples with events of each split that are used; without tasks the number of patients."""
        splits = self.manifest.splits.items()
        return {split: int(self.index_of(split).count(shards).sum()) for split, shards in splits}

    def index_of(self, split: str) -> SampleIndex:
        """Return the samples of a split that are used."""
        return SampleIndex(self.folder, self.manifest, self.tasks, chosen=self.chosen.get(split))

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Return what a model of this data predicts; without tasks it has a head that nothing trains."""
        return tuple(map(outcome_of, self.tasks)) or (Outcome(),)

    @property
    def unit(self) -> str:
        """Return what a sample is called: whole patients are patients."""
        if common_times(self.tasks) is None:
            return "patients"
        return f"samples of task {', '.join(task.name for task in self.tasks)}"

    def check_train_split(self) -> None:
        """Raise UserError where nobody can be learned from."""
        if not self.num_samples["train"]:
            raise UserError(f"{self.folder}: no patients to train on; its train split is empty, or left out")

    def describe(self) -> str:
        """Return the samples of each split and the number of variables in one line."""
        counts = ", ".join(f"{samples:,} {split}" for split, samples in self.num_samples.items())
        return f"{self.unit}: {counts}; {self.manifest.num_codes - FIRST_CODE} variables"

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the arguments of :meth:`open_loader` by which training steps draw samples."""
        return {name: getattr(self.options, name) for name in ("sampling", "sampling_weights", "data_weights")}

    def open_loader(
        self, split: str, *, world: World, preparer: BatchPreparer | None = None, **arguments: Any
    ) -> PatientLoader:
        """Return a loader over a split, batched as the options say and within the memory that ``preparer`` divides.

        Other ``arguments`` are those of :func:`make_loader`, such as ``seed`` and ``shuffle``; they win.  Each sample
        is used once an epoch, unless they are those of :attr:`sampling`.
        """
        names = ["batch_size", "prefetch", *(field.name for field in dataclasses.fields(BatchOptions))]
        settings = {name: getattr(self.options, name) for name in names}
        settings |= {"transform": preparer, "rank": world.rank, "world_size": world.size}
        settings |= {"sampling": "natural", "sampling_weights": None, "data_weights": ()}
        if preparer is not None and (memory := preparer.memory) is not None:
            settings |= {"batch_size": memory.batch_size, "max_cost": memory.batch_bytes, "budget": memory.peak}
        elif settings["batch_size"] == "auto":
            settings["batch_size"] = DEFAULT_BATCH_SIZE
        part = SplitPart(split, self.chosen.get(split))
        settings |= {"split": part, "task": self.tasks, "quarantined": self.quarantined_shards, **arguments}
        return make_loader(self.folder, manifest=self.manifest, **settings)


def sample_patients(data: DataSet, split: str, number: int) -> DataSet:
    """Return the data with ``number`` patients of a split alone, among those that have samples; 0 = all.

    They are the same ones in every run, and among those of every larger number.
    """
    entries = data.manifest.splits.get(split, [])
    if not number or not entries:
        return data
    patients = np.unique(data.index_of(split).read(entries).patient)
    used = np.zeros(sum(entry.num_patients for entry in entries), bool)
    used[np.random.default_rng(SAMPLE_SALT).permutation(patients)[:number]] = True
    return dataclasses.replace(data, chosen={**data.chosen, split: split_by_shard(entries, used)})


def agree_on_data(options: DataOptions, manifest: Manifest, world: World, task: str | None, *splits: str) -> DataSet:
    """Return the data set that all ranks use, with the named tasks, without shards of ``splits`` bad on any machine.

    Plans are made of the shards that there are, so all ranks must know of all bad ones before they plan.  Machines may
    hold copies of a data set: each checks all shards, and what is bad on one is left out by all.
    """
    folder, found = options.open_folder(), dict[str, str]()
    tasks = load_tasks(folder, manifest, task)
    if options.on_bad_shard == "quarantine":
        entries = [entry for split in splits for entry in manifest.splits.get(split, [])]
        found = check_shards(folder, world.own_part(entries), fetch_ahead=options.fetch_ahead)
    identity = (hashlib.sha256(manifest.encode()).hexdigest(), [each.table_sha256 for each in tasks])
    answers = world.gather((identity, found))
    others = [rank for rank, (other, _) in enumerate(answers) if other != answers[0][0]]
    if others:
        differs = f"that of rank {others[0]} is not that of rank 0"
        raise UserError(f"--data_dir: not the same data set on all machines ({differs}); copy it anew, or start again")
    bad = {path: reason for _, answer in answers for path, reason in answer.items()}
    quarantined: dict[str, list[ShardEntry]] = {}
    for split, entries in manifest.splits.items():
        quarantined[split] = [entry for entry in entries if entry.path in bad]
        for entry in quarantined[split]:
            left_out = f"its {entry.num_patients:,} {split} patients are left out"
            log_main(world, f"warning: {folder}/{entry.path}: {bad[entry.path]}; {left_out}")
    manifest = manifest.without(bad)
    return DataSet(options=options, folder=folder, manifest=manifest, tasks=tasks, quarantined=quarantined)


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
        padded: whether batches go through the padded layout.
        pad_to: columns of that layout; None = the longest patient of the batch.
        pin: whether each part is packed into one page-locked buffer, for one copy to a GPU.
        capacities: the sizes to which batches are filled up; none = batches have sizes of their own.
        hours: after which outcomes are predicted too, in the same pass; see :meth:`Prefixes.after_hours`.
        teacher: what the model is trained towards beside the labels.
    """

    seed: int | None
    event_dropout: float = 0.0
    padded: bool = False
    pad_to: int | None = None
    memory: StepMemory | None = None
    pin: bool = False
    capacities: tuple[BatchShape, ...] = ()
    hours: tuple[float, ...] = ()
    teacher: Teacher | None = None

    def __call__(self, batch: PatientBatch, place: BatchPlace) -> ReadyBatch:
        seen = batch = batch if self.teacher is None else self.teacher.soften(batch)
        if self.padded:
            padded = batch.to_padded(pad_to=self.pad_to)
            seen = PatientBatch.from_padded(padded, batch.patient_id, batch.prediction_time)
            seen = dataclasses.replace(seen, samples=batch.samples)
        whole = place.counts
        counts = LossCounts(num_events=whole.num_events, num_sets=whole.num_sets, num_labelled=whole.num_labelled)
        if self.seed is not None and self.event_dropout:
            seen = drop_events(seen, self.event_dropout, seed=self.seed, step=place.step)
            if seen.num_patients == whole.num_patients:  # no other rank has a share
                counts = dataclasses.replace(counts, num_events=seen.num_events, num_sets=seen.num_sets)
            else:
                counts = count_after_dropout(place, self.event_dropout, seed=self.seed)
        amounts = BatchAmounts.of(batch, pad_to=self.pad_to)
        return ReadyBatch(parts=self.prepare_parts(seen, place.step), batch=seen, counts=counts, amounts=amounts)

    def prepare_parts(self, batch: PatientBatch, step: int) -> list[PreparedBatch]:
        """Return a batch as prepared batches that fit the memory one after another."""
        return [self.prepare(part, step) for part in (self.memory.split(batch) if self.memory else [batch])]

    def prepare(self, batch: PatientBatch, step: int) -> PreparedBatch:
        """Return what the model takes of one part of a batch at training step ``step``."""
        prefixes = Prefixes.after_hours(batch, self.hours) if self.hours else None
        prepared = PreparedBatch.build(batch, prefixes=prefixes, seed=self.seed, step=step, capacities=self.capacities)
        return prepared.pack(pin=True) if self.pin else prepared
