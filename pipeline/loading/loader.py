"""The loader: plans and patients to a stream of batches, which can stop anywhere and go on from there.

The *place* of a loader is (epoch, cursor); the cursor counts the batches handed out in this epoch.  The rules:

* A batch counts when it is handed out, however many more are ready.  Save the state after the step of a batch.
* An iteration begins at the place.  When it has handed out the epoch's last batch *and is asked for another*, it ends,
  and the place is the start of the next epoch.  A state saved between the two resumes to an epoch with no batches
  left, so that whatever follows an epoch is not skipped.
* Leaving an iteration early keeps the place.  ``set_epoch`` of another epoch goes to its start, of the same one does
  nothing, so it can stand at the head of a training loop, resumed or not.

A split is walked in *groups* of shards (``pipeline.sampling.groups``).  One that fits in a single group stays in
memory.  Of
several, the group in use is there and the next one, which a thread reads, verifies and plans meanwhile; a place lies in
a group, and going there reads that group alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.arrays import offsets_of
from pipeline.dataset.manifest import Manifest
from pipeline.loading.batch import PatientBatch
from pipeline.loading.prefetch import prefetch
from pipeline.loading.store import Outline, PatientStore, Truncate, Windows
from pipeline.sampling.cost import CostModel
from pipeline.sampling.groups import GROUP_EVENTS, Group, Grouping, group_shards
from pipeline.sampling.plan import EpochPlan, deal, plan_epoch, source_of_chance
from pipeline.sampling.policy import BUCKET_WIDTH, Axis, Layout, Policy
from pipeline.schema import UNLABELLED, UserError
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder

STATE_VERSION = 2

GATHER_EVENTS = 1 << 17
"""Ragged batches are gathered together up to about this many events: 2 MB, enough to hide the cost of a call."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """What a global batch holds, over all ranks: the divisors of a data-parallel mean."""

    num_patients: int
    num_labelled: int
    num_sets: int
    num_events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """A group of an epoch, planned; N batches.  Its patients are numbered as its store has them.

    Attributes:
        epoch: the epoch.
        number: of the group in the epoch, from 0 on.
        first_step: the epoch's batches before this group.
        shards: the split's shards that the group's store holds, ascending.
        windows: the events to use of each patient.
        plan: the group's global batches.
        share: this rank's part of each.
        num_labelled, num_sets, num_events: [N] of each global batch.
    """

    epoch: int
    number: int
    first_step: int
    shards: list[int]
    windows: Windows
    plan: EpochPlan
    share: EpochPlan
    num_labelled: npt.NDArray[np.int64]
    num_sets: npt.NDArray[np.int64]
    num_events: npt.NDArray[np.int64]

    @property
    def stop_step(self) -> int:
        """The epoch's batches up to the end of this group."""
        return self.first_step + self.plan.num_batches

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.plan.order.tobytes())
        digest.update(self.plan.batch_offsets.tobytes())
        return digest.hexdigest()


Loaded = tuple[GroupPlan, PatientStore]


class PatientLoader:
    """Batches of one split and one rank; made by :func:`make_loader`, used as an iterable.

    Attributes:
        manifest: of the data directory.
        num_patients: patients of the split, over all ranks.
        epoch: the current epoch.
        cursor: batches handed out in it.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        *,
        split: str,
        quarantined: Collection[str],
        policy: Policy,
        seed: int,
        max_sequence_length: int | None,
        truncate: Truncate,
        rank: int,
        world_size: int,
        cost: CostModel,
        group_events: int,
        prefetch: int,
        pin_memory: bool,
        verify: bool,
    ) -> None:
        if split not in manifest.splits:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(sorted(manifest.splits))}")
        self.manifest = manifest
        self._folder = folder
        self._entries = manifest.splits[split]
        self.num_patients = sum(entry.num_patients for entry in self._entries)
        self._policy = policy
        self._seed = seed
        self._max_sequence_length = max_sequence_length
        self._truncate: Truncate = truncate
        self._rank = rank
        self._world_size = world_size
        self._cost = cost
        self._group_events = group_events
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._verify = verify
        self._settings = {
            "data": manifest.fingerprint,
            "split": split,
            "quarantined": sorted(quarantined),
            "seed": seed,
            **asdict(policy),
            "max_sequence_length": max_sequence_length,
            "truncate": truncate,
            # Where all fits in one group its limit decides nothing.
            "group_events": group_events if sum(entry.num_events for entry in self._entries) > group_events else None,
        }
        self._latest: Loaded | None = None  # the group that was read last, by whichever thread
        self._go_to(0)

    def _go_to(self, epoch: int, cursor: int = 0, *, number: int = 0, first_step: int = 0) -> None:
        """Stand at ``cursor``, in group ``number``, which begins at ``first_step``; an iteration under way is over."""
        self._group, _ = self._load(epoch, number, first_step)
        self.epoch, self.cursor = epoch, cursor
        self._num_batches: int | None = None
        self._iteration = object()

    def _grouping(self, epoch: int) -> Grouping:
        return group_shards(
            np.array([entry.num_patients for entry in self._entries], np.int64),
            np.array([entry.num_events for entry in self._entries], np.int64),
            group_events=self._group_events,
            multiple=self._policy.fixed_size or 1,
            shuffle=self._policy.shuffle,
            seed=self._seed,
            epoch=epoch,
        )

    def _load(self, epoch: int, number: int, first_step: int) -> Loaded:
        """Read and plan a group.  What was read last is not read again, so a split of one group is read once."""
        latest = self._latest
        if latest and (latest[0].epoch, latest[0].number, latest[0].first_step) == (epoch, number, first_step):
            return latest
        group = self._grouping(epoch).group(number)
        shards = group.shards.tolist()
        if latest and latest[0].shards == shards:
            store = latest[1]
        else:
            store = PatientStore(self._folder, [self._entries[shard] for shard in shards], verify=self._verify)
        windows, plan = self._plan(group, store, epoch, number)
        cost = self._cost.of(windows.num_events, windows.num_sets)
        planned = GroupPlan(
            epoch=epoch,
            number=number,
            first_step=first_step,
            shards=shards,
            windows=windows,
            plan=plan,
            share=deal(plan, cost, rank=self._rank, world_size=self._world_size, first_step=first_step),
            num_labelled=plan.totals(store.label != UNLABELLED),
            num_sets=plan.totals(windows.num_sets),
            num_events=plan.totals(windows.num_events),
        )
        self._latest = planned, store
        return self._latest

    def _plan(self, group: Group, outline: Outline, epoch: int, number: int) -> tuple[Windows, EpochPlan]:
        """Windows of all patients of ``outline``, and global batches of those that are the group's."""
        rng = source_of_chance(1, seed=self._seed, epoch=epoch, group=number)
        windows = outline.windows(self._max_sequence_length, self._truncate, rng)
        num_events, num_sets = windows.num_events[group.patients], windows.num_sets[group.patients]
        plan = plan_epoch(num_events, num_sets, self._policy, seed=self._seed, epoch=epoch, group=number)
        return windows, EpochPlan(order=group.patients[plan.order], batch_offsets=plan.batch_offsets)

    def _outline(self, group: Group) -> Outline:
        """Of the shards of a group: the one in memory, or read for this."""
        shards, latest = group.shards.tolist(), self._latest
        if latest and latest[0].shards == shards:
            return latest[1]
        return Outline.read(self._folder, [self._entries[shard] for shard in shards])

    @property
    def plan(self) -> EpochPlan:
        """Global batches of the current group."""
        return self._group.plan

    @cached_property
    def longest_patient(self) -> int:
        """Most events of a patient of the split, after truncation: the width that fits every batch.

        Of a split in several groups it reads the lengths of all patients, as ``len`` may.
        """
        grouping = self._grouping(self.epoch)
        outlines = (self._outline(grouping.group(number)) for number in range(grouping.num_groups))
        return max(int(outline.windows(self._max_sequence_length).num_events.max(initial=0)) for outline in outlines)

    def __len__(self) -> int:
        """Batches of the current epoch from its start, equal on every rank; exact.

        Where batches have a fixed size it follows from the manifest.  Otherwise the groups that are still to come in
        the epoch are planned for this, once an epoch, from the lengths in their shards.
        """
        if size := self._policy.fixed_size:
            return (self.num_patients + size - 1) // size
        if self._num_batches is None:
            grouping = self._grouping(self.epoch)
            self._num_batches = self._group.stop_step
            for number in range(self._group.number + 1, grouping.num_groups):
                group = grouping.group(number)
                self._num_batches += self._plan(group, self._outline(group), self.epoch, number)[1].num_batches
        return self._num_batches

    def step_counts(self, step: int) -> StepCounts:
        """Global counts of batch ``step`` of the current epoch, known to every rank without communication.

        Raises:
            IndexError: the batch is not of the group in which the latest one was.
        """
        group = self._group
        if not group.first_step <= step < group.stop_step:
            raise IndexError(f"step {step}: the current group has {group.first_step} up to {group.stop_step}")
        step -= group.first_step
        return StepCounts(
            num_patients=int(group.plan.batch_sizes[step]),
            num_labelled=int(group.num_labelled[step]),
            num_sets=int(group.num_sets[step]),
            num_events=int(group.num_events[step]),
        )

    def predicted(self, cost: CostModel) -> npt.NDArray[np.float64]:
        """[N] float64, what each global batch of the current group costs."""
        windows = self._group.windows
        return self.plan.totals(cost.of(windows.num_events, windows.num_sets)) + cost.batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; where that is the current one, stay."""
        if epoch != self.epoch:
            self._go_to(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place, and what it is a place in: a few hundred bytes of JSON-like values, the same on every rank."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "group": self._group.number,
            "first_step": self._group.first_step,
            "plan": self._group.fingerprint(),
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of ``state``, without replaying what came before; any number of ranks may have saved it.

        Raises:
            UserError: the state is of other data, another split, seed or policy, and so of other batches.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"loader state of version {state.get('version')}, this program resumes {STATE_VERSION}")
        for name, mine in self._settings.items():
            saved = state["settings"].get(name)
            if saved != mine:
                raise UserError(
                    f"cannot resume: {name} was {saved} and is now {mine}; give the same data and flags, or start anew"
                )
        planned, _ = self._load(state["epoch"], state["group"], state["first_step"])
        if state["plan"] != planned.fingerprint():
            raise UserError("cannot resume: equal settings give other batches; use the NumPy version of the saved run")
        self._go_to(state["epoch"], state["cursor"], number=state["group"], first_step=state["first_step"])

    def __iter__(self) -> Generator[PatientBatch, None, None]:
        """Batches from the place to the end of the epoch."""
        return self._hand_out(self._ragged)

    def padded(self) -> Generator[dict[str, Tensor], None, None]:
        """The same batches as ``to_padded()`` gives them, made without that detour."""
        return self._hand_out(self._padded)

    def _hand_out(self, make: Callable[[GroupPlan, PatientStore, int], Iterator[T]]) -> Generator[T, None, None]:
        self._iteration = iteration = object()
        with closing(prefetch(self._made(make), self._prefetch)) as made:
            for group, batch in made:
                if self._iteration is not iteration:
                    raise RuntimeError("the loader went elsewhere, or another iteration began, during this one")
                self._group = group
                self.cursor += 1
                yield batch
        if self._iteration is iteration:
            self._go_to(self.epoch + 1)

    def _made(
        self, make: Callable[[GroupPlan, PatientStore, int], Iterator[T]]
    ) -> Generator[tuple[GroupPlan, T], None, None]:
        """This rank's batches from the place on, each with its group."""
        cursor = self.cursor
        num_groups = self._grouping(self.epoch).num_groups
        groups = self._groups(self._group, num_groups)
        with closing(prefetch(groups, min(self._prefetch, 1) if num_groups > 1 else 0)) as loaded:
            for group, store in loaded:
                for batch in make(group, store, max(cursor - group.first_step, 0)):
                    yield group, batch
                del store  # or a third group would be read while this one is held

    def _groups(self, group: GroupPlan, num_groups: int) -> Generator[Loaded, None, None]:
        """The groups of an epoch from ``group`` on; then the next epoch's first is made ready."""
        epoch, number, first_step = group.epoch, group.number, group.first_step
        while number < num_groups:
            group, store = self._load(epoch, number, first_step)
            yield group, store
            number, first_step = number + 1, group.stop_step
        self._load(epoch + 1, 0, 0)

    def _ragged(self, group: GroupPlan, store: PatientStore, step: int) -> Iterator[PatientBatch]:
        share, windows = group.share, group.windows
        events_before = offsets_of(share.totals(windows.num_events))
        while step < share.num_batches:
            # The most steps within GATHER_EVENTS, but at least one.
            stop = int(np.searchsorted(events_before, events_before[step] + GATHER_EVENTS, side="right")) - 1
            offsets = share.batch_offsets[step : (step := max(stop, step + 1)) + 1]
            for batch in store.ragged(windows, share.order[offsets[0] : offsets[-1]], offsets - offsets[0]):
                yield batch.pin_memory() if self._pin_memory else batch

    def _padded(self, group: GroupPlan, store: PatientStore, step: int) -> Iterator[dict[str, Tensor]]:
        for number in range(step, group.share.num_batches):
            padded = store.padded(group.windows, group.share.patients(number))
            yield {name: tensor.pin_memory() for name, tensor in padded.items()} if self._pin_memory else padded


def make_loader(
    directory: str | Path | Folder,
    *,
    manifest: Manifest | None = None,
    quarantined: Collection[str] = (),
    split: str = "train",
    batch_size: int | None = 16,
    max_events: int | None = None,
    max_cost: float | None = None,
    budget: CostModel | None = None,
    shuffle: bool = True,
    seed: int = 0,
    bucketing: bool = True,
    bucket_by: Axis = "events",
    bucket_width: float = BUCKET_WIDTH,
    max_sequence_length: int | None = None,
    truncate: Truncate = "earliest",
    layout: Layout = "ragged",
    rank: int = 0,
    world_size: int = 1,
    cost: CostModel | None = None,
    group_events: int = GROUP_EVENTS,
    prefetch: int = 2,
    pin_memory: bool = False,
    verify: bool = True,
) -> PatientLoader:
    """A loader over one split of a data directory.

    Batches, their order and their content depend on the data, ``seed``, the epoch and the flags that group; not on
    ``rank``, ``world_size``, ``prefetch``, nor on what was loaded before.

    Args:
        directory: what preprocess.py wrote: a path, a URL, or what :func:`pipeline.storage.remote.open_folder` gave.
        manifest: that of the directory, where it has been read already.
        quarantined: paths of shards to leave out, as :func:`pipeline.dataset.shards.check_shards` finds them; it
        must be
            equal on all ranks.
        split: ``train``, ``valid`` or ``test``.
        batch_size: most patients of a global batch, or None.
        max_events: most events of a global batch, or None; see :class:`pipeline.sampling.policy.Policy`.
        max_cost: most that a global batch costs, or None; a patient who costs more is a batch alone.
        budget: what ``max_cost`` counts, by default the time of a step.
        shuffle: new batches in a new order every epoch; otherwise the same ones, in order of length.
        seed: of plan and truncation, 0 or more.
        bucketing: group patients of like length; otherwise at random (or, without shuffle, in stored order).
        bucket_by: the axis on which they are alike.
        bucket_width: how far apart patients of a batch may be, in batches.
        max_sequence_length: most events of a patient, or None.
        truncate: which events of a longer patient are kept.
        layout: what ``max_events`` counts, the events (``ragged``) or the padded area (``padded``).
        rank: which share of each global batch; it may be empty where a batch has fewer patients than there are ranks.
        world_size: number of ranks.
        cost: by which patients are dealt to ranks evenly; it must be equal on all ranks.
        group_events: a split of more events is never in memory as a whole: it is read, planned and mixed in groups of
            about so many, other ones every epoch, two of which are in memory.
        prefetch: batches made ahead by a thread, and by another the next group; 0 for no thread.
        pin_memory: give page-locked tensors, for copies to a GPU that do not block.
        verify: compare the shards' checksums with the manifest's.

    Raises:
        UserError: the data cannot be used, or a flag is out of range.
    """
    for flag, number, least in (
        ("max_sequence_length", max_sequence_length, 1),
        ("seed", seed, 0),
        ("group_events", group_events, 1),
        ("prefetch", prefetch, 0),
        ("world_size", world_size, 1),
    ):
        if number is not None and number < least:
            raise UserError(f"--{flag} {number}: must be at least {least}")
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not among {world_size} ranks, counted from 0")
    if truncate not in get_args(Truncate):
        raise UserError(f"--truncate {truncate}: must be one of {', '.join(get_args(Truncate))}")
    policy = Policy(
        batch_size=batch_size,
        max_events=max_events,
        layout=layout,
        max_cost=max_cost,
        cost=budget or CostModel(),
        bucket_by=bucket_by if bucketing else None,
        bucket_width=bucket_width,
        shuffle=shuffle,
    )
    folder = open_folder(directory)
    manifest = (manifest or Manifest.load(folder)).without(quarantined)
    return PatientLoader(
        folder,
        manifest,
        split=split,
        quarantined=quarantined,
        policy=policy,
        seed=seed,
        max_sequence_length=max_sequence_length,
        truncate=truncate,
        rank=rank,
        world_size=world_size,
        cost=cost or CostModel(),
        group_events=group_events,
        prefetch=prefetch,
        pin_memory=pin_memory,
        verify=verify,
    )
