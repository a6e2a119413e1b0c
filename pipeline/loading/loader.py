"""The loader: plans and patients to a stream of batches, which can stop anywhere and go on from there.

The *place* of a loader is (epoch, cursor, step): the cursor counts the batches handed out in this epoch, the step those
of all epochs.  The rules:

* A batch counts when it is handed out, however many more are ready.  Save the state after the step of a batch.
* An iteration begins at the place.  When it has handed out the epoch's last batch *and is asked for another*, it ends,
  and the place is the start of the next epoch.  A state saved between the two resumes to an epoch with no batches
  left, so that whatever follows an epoch is not skipped.
* Leaving an iteration early keeps the place.  Who counts batches and leaves after the epoch's last one goes on with the
  next epoch.
* One iteration at a time, in the process that began it: an older one, or one that a fork took along, raises.

A split is walked in *groups* of shards (``pipeline.sampling.groups``), which are planned from the index alone.  Shards
are first read when an iteration begins, each when the first batch needs it: so the first step waits for the shards of
its own batch alone.  A split of a single group then stays in memory.  Of several groups, the one in use is there and
the next one, which a thread reads and verifies meanwhile.  Shards of a URL are fetched ahead by threads of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.arrays import Floats
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.patients import SplitPart, fingerprint_patients
from pipeline.dataset.samples import read_empty_samples
from pipeline.dataset.tasks import Task, common_times, load_tasks
from pipeline.loading.batch import PatientBatch
from pipeline.loading.groups import GroupPlan, GroupPlanner, LoadedGroup, Position
from pipeline.loading.options import LoaderOptions
from pipeline.loading.place import BatchPlace
from pipeline.loading.prefetch import prefetch
from pipeline.loading.store import PatientStore
from pipeline.sampling.cost import CostModel
from pipeline.sampling.plan import EpochPlan
from pipeline.sampling.policy import Policy
from pipeline.schema import DEFAULT_TASK, UserError
from pipeline.storage.ahead import AheadFolder
from pipeline.storage.folder import File, Folder
from pipeline.storage.remote import open_folder

STATE_VERSION = 5

ONE_PROCESS = "give DataLoader num_workers=0, or make the loader in the process that iterates it; a thread prefetches"

SETTINGS = ("seed", "max_sequence_length", "truncate", "share_windows", "sampling")
"""Options that decide batches beside those of :class:`Policy`."""

Transform: TypeAlias = Callable[[PatientBatch, BatchPlace], Any]


class PatientLoader(IterableDataset[Any]):
    """Batches of one split and one rank; an iterable of whole batches (docs/loader.md has it in other training loops).

    Batches, their order and their content depend on the data, ``seed``, the epoch and the options that group; not on
    ``rank``, ``world_size``, ``prefetch``, nor on what was loaded before.

    Attributes:
        split, tasks: what the samples are of; no tasks = whole patients.
        num_samples: samples of the split that have events, over all ranks; without tasks its patients, and with
            ``share_windows`` the windows that samples share.
        cursor: number of batches handed out in the current ``epoch``.
        step: number of batches handed out in all epochs.
    """

    def __init__(
        self,
        directory: str | Path | Folder,
        *,
        split: str | SplitPart = "train",
        task: str | tuple[Task, ...] | None = DEFAULT_TASK,
        manifest: Manifest | None = None,
        quarantined: Collection[str] = (),
        transform: Transform | None = None,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        """Open a split of a data directory.

        Args:
            directory: what preprocess.py wrote: a path, a URL, or what ``open_folder`` returned.
            split: ``train``, ``valid`` or ``test``; or some patients of one.
            task: name of the task whose samples are loaded, names of several between commas, or the tasks
                themselves; None = whole patients without labels.
            manifest: of the directory, if it has been read already.
            quarantined: paths of shards to leave out, as ``pipeline.dataset.shards.check_shards`` finds them; equal on
                all ranks.
            transform: called with each batch and its place, in the prefetch thread, for what the loader hands out; of
                a future it is the result.
            rank: which part of each global batch to load; it may be empty if a batch has fewer patients than ranks.
            world_size: number of ranks.
            options: fields of :class:`pipeline.loading.options.LoaderOptions`.
        """
        self._folder, self._transform = open_folder(directory), transform
        self.manifest = (manifest or Manifest.load(self._folder)).without(quarantined)
        self.tasks = task if isinstance(task, tuple) else load_tasks(self._folder, self.manifest, task)
        self.options = LoaderOptions(**options)
        if self.options.truncate is None:
            self.options = replace(self.options, truncate="latest" if common_times(self.tasks) else "earliest")
        if world_size < 1:
            raise UserError(f"--world_size {world_size}: must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not among {world_size} ranks, counted from 0")
        self._part = split if isinstance(split, SplitPart) else SplitPart(split, None)
        self.split, splits = self._part.split, sorted(self.manifest.splits)
        if self.split not in splits:
            raise UserError(f"{self._folder}: no split {self.split!r}; it has {', '.join(splits)}")
        self._ranks = {"rank": rank, "world_size": world_size}
        self._planner = GroupPlanner(self._folder, self.manifest, self._part, self.tasks, self.options)
        entries = self._planner.entries
        self.num_samples = int(self._planner.num_samples.sum())
        is_grouped = sum(entry.num_events for entry in entries) > self.options.group_events
        names = [*(field.name for field in fields(Policy)), *SETTINGS]
        patients = "all" if self._part.patients is None else fingerprint_patients(self._part.patients)
        data = {"data": self.manifest.fingerprint, "split": self.split}
        task_names = [f"{each.name} ({each.table_sha256[:12]})" for each in self.tasks]
        policy = {name: asdict(self.options)[name] for name in names} | self._planner.describe_weights()
        group_events = self.options.group_events if is_grouped else None  # else the limit decides nothing
        used = {"patients": patients, "quarantined": sorted(quarantined), "task": task_names}
        self._settings: dict[str, Any] = {**data, **used, **policy, "group_events": group_events}
        self._loaded: LoadedGroup | None = None  # the group that was read last, by whichever thread
        self.step = 0
        self._go_to(Position(epoch=0))

    def _go_to(self, position: Position, cursor: int = 0) -> None:
        """Go to batch ``cursor`` of the epoch, which lies in the group at ``position``; an iteration under way ends."""
        self._group, self.epoch, self.cursor = self._planner.plan_group(position), position.epoch, cursor
        self._num_batches: int | None = None
        self._handed_out = False  # whether the place follows a batch, and is not one to begin or to resume at
        self._iteration = object()

    @property
    def plan(self) -> EpochPlan:
        """Global batches of the current group."""
        return self._group.batches

    @cached_property
    def longest_patient(self) -> int:
        """Maximum number of events of a sample of the split, after truncation."""
        return self._planner.max_num_events()

    def __len__(self) -> int:
        """Return the exact number of batches of the current epoch from its start, equal on every rank.

        If batches have no fixed size, the groups that are still to come in the epoch are planned for this, once.
        """
        if size := self.options.fixed_size:
            return (self.num_samples + size - 1) // size
        if self._num_batches is None:
            self._num_batches = self._planner.count_batches(self._group)
        return self._num_batches

    def read_empty_samples(self, task: Task) -> pa.Table:
        """Return patient, prediction times and labels of a task's samples of the split without events, in no batch."""
        entries, chosen = self.manifest.splits[self.split], self._part.patients
        return read_empty_samples(self._folder, task, entries, chosen, verify=self.options.verify)

    def predict_costs(self, cost: CostModel) -> Floats:
        """Return the predicted cost of each global batch of the current group, [N] float64.

        With truncation it is an upper bound: the index does not say where the sets of a patient end.
        """
        return self.plan.sum_per_batch(cost.predict(self._group.num_events, self._group.num_sets)) + cost.batch

    def count_draws(self, epoch: int) -> dict[str, int] | None:
        """Return how many samples an epoch uses, of each class, and how many different ones; None = each once."""
        return None if self._planner.draws is None else self._planner.draws.count(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; stay if that is the current one."""
        if epoch != self.epoch:
            self._go_to(Position(epoch))

    def state_dict(self) -> dict[str, Any]:
        """Return the place and the settings that it depends on: a few hundred bytes of JSON, the same on every rank."""
        _, group, first_step = self._group.position
        place = {"epoch": self.epoch, "cursor": self.cursor, "step": self.step}
        plan = {"group": group, "first_step": first_step, "plan": self._group.fingerprint()}
        return {"version": STATE_VERSION, **place, **plan, "settings": dict(self._settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of ``state``, without replaying what came before; any number of ranks may have saved it.

        A state of other data, another split, seed or policy, and so of other batches, is refused.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"loader state of version {state.get('version')}, this program resumes {STATE_VERSION}")
        for name, current in self._settings.items():
            if (saved := state["settings"].get(name)) != current:
                change = f"{name} was {saved} and is now {current}"
                raise UserError(f"cannot resume: {change}; give the same data and flags, or start anew")
        position = Position(state["epoch"], state["group"], state["first_step"])
        if state["plan"] != self._planner.plan_group(position).fingerprint():
            raise UserError("cannot resume: equal settings give other batches; use the NumPy version of the saved run")
        self._go_to(position, state["cursor"])
        self.step = state["step"]

    def __getstate__(self) -> Any:
        """Refuse to be sent to another process, in which the place would move without this one."""
        raise RuntimeError(f"a loader cannot be copied or sent to another process: {ONE_PROCESS}")

    def __iter__(self) -> Generator[Any, None, None]:
        """Yield batches, or what the transform makes of them, from the place to the end of the epoch."""
        if get_worker_info() is not None:
            raise RuntimeError(f"each worker would give all batches, again in every epoch: {ONE_PROCESS}")
        _, number, stop = self._group.next_position
        if self._handed_out and self.cursor == stop and number == self._planner.grouping(self.epoch).num_groups:
            self._go_to(Position(self.epoch + 1))
        self._iteration = iteration = object()
        process = os.getpid()
        files = AheadFolder(self._folder, self.options.fetch_ahead)
        with closing(files), closing(prefetch(self._make_items(files), self.options.prefetch, files.close)) as items:
            for group, item in items:
                if self._iteration is not iteration:
                    raise RuntimeError("the loader went elsewhere, or another iteration began, during this one")
                self._group, self._handed_out = group, True
                self.cursor += 1
                self.step += 1
                yield item.result() if isinstance(item, Future) else item
                if os.getpid() != process:
                    raise RuntimeError("this iteration was begun before os.fork(); begin a new one in the new process")
        if self._iteration is iteration:
            self._go_to(Position(self.epoch + 1))

    def _make_items(self, files: AheadFolder) -> Generator[tuple[GroupPlan, Any], None, None]:
        """Yield this rank's items from the place on, each with its group."""
        cursor, steps_before_epoch, transform = self.cursor, self.step - self.cursor, self._transform
        num_groups = self._planner.grouping(self.epoch).num_groups
        groups = self._load_groups(self._group, cursor, num_groups, files)
        with closing(prefetch(groups, min(self.options.prefetch, 1) if num_groups > 1 else 0)) as loaded:
            for group in loaded:
                first = max(cursor - group.plan.position.first_step, 0)
                for number, batch in enumerate(group.gather(files, first), start=first):
                    item = batch if transform is None else transform(batch, group.place(number, steps_before_epoch))
                    yield group.plan, item
                del group  # or a third group would be read while this one is in memory

    def _load_groups(
        self, plan: GroupPlan, cursor: int, num_groups: int, files: AheadFolder
    ) -> Generator[LoadedGroup, None, None]:
        """Yield the groups of an epoch from ``plan`` on; then load the first group of the next epoch.

        The first one is read while its batches are used, the others before.
        """
        group = self._open_group(plan, files, first=cursor - plan.position.first_step)
        yield group
        group.read(files)
        del group
        while plan.next_position.number < num_groups:
            plan = self._planner.plan_group(plan.next_position)
            yield self._load_group(plan, files)
        self._load_group(self._planner.plan_group(Position(plan.position.epoch + 1)), files)

    def _load_group(self, plan: GroupPlan, files: AheadFolder) -> LoadedGroup:
        """Open a group and read all of it."""
        group = self._open_group(plan, files)
        group.read(files)
        return group

    def _open_group(self, plan: GroupPlan, files: AheadFolder, first: int = 0) -> LoadedGroup:
        """Announce the shards that a group lacks, in the order in which its batches from ``first`` on need them.

        Shards that were read last are not read again, so a split of one group is read once.
        """
        latest, entries = self._loaded, [self._planner.entries[shard] for shard in plan.shards]
        if latest and latest.plan.position == plan.position and not latest.unread:
            group = latest
        else:
            store = latest.store if latest and latest.plan.shards == plan.shards else None
            if store is None:
                excluded = self.tasks[0].excluded_codes if self.tasks else ()
                store = PatientStore(self._folder, entries, excluded_codes=excluded)
            group = LoadedGroup(plan, store, self.options, first=first, **self._ranks)
        shards = (entries[number] for number in group.unread)
        files.announce(File(each.path, each.sha256, each.num_bytes, self.options.verify) for each in shards)
        self._loaded = group
        return group


make_loader = PatientLoader  # the verb by which users know it
