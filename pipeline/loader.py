"""The loader: plan and patients to a stream of batches, which can stop anywhere and go on from there.

The *place* of a loader is (epoch, cursor); the cursor counts the batches handed out in this epoch.  The rules:

* A batch counts when it is handed out, however many more are ready.  Save the state after the step of a batch.
* An iteration begins at the place.  When it has handed out the epoch's last batch *and is asked for another*, it ends,
  and the place is the start of the next epoch.  A state saved between the two resumes to an epoch with no batches
  left, so that whatever follows an epoch is not skipped.
* Leaving an iteration early keeps the place.  ``set_epoch`` of another epoch goes to its start, of the same one does
  nothing, so it can stand at the head of a training loop, resumed or not.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar, get_args

import numpy as np
from torch import Tensor

from pipeline.batch import PatientBatch
from pipeline.flat import offsets_of
from pipeline.folder import Folder
from pipeline.plan import BUCKET_WIDTH, Axis, CostModel, Layout, Policy, deal, plan_epoch
from pipeline.remote import open_folder
from pipeline.schema import UNLABELLED, UserError
from pipeline.shards import Manifest
from pipeline.store import PatientStore, Truncate

STATE_VERSION = 1

GATHER_EVENTS = 1 << 16
"""Ragged batches are gathered together up to about this many events: 1 MB, enough to hide the cost of a call."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """What a global batch holds, over all ranks: the divisors of a data-parallel mean."""

    num_patients: int
    num_labelled: int
    num_sets: int
    num_events: int


class PatientLoader:
    """Batches of one split and one rank; made by :func:`make_loader`, used as an iterable.

    Attributes:
        manifest: of the data directory.
        plan: global batches of the current epoch.
        epoch: the current epoch.
        cursor: batches handed out in it.
    """

    def __init__(
        self,
        store: PatientStore,
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
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        self.manifest = manifest
        self._store = store
        self._policy = policy
        self._seed = seed
        self._max_sequence_length = max_sequence_length
        self._truncate: Truncate = truncate
        self._rank = rank
        self._world_size = world_size
        self._cost = cost
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._settings = {
            "data": manifest.fingerprint,
            "split": split,
            "quarantined": sorted(quarantined),
            "seed": seed,
            **asdict(policy),
            "max_sequence_length": max_sequence_length,
            "truncate": truncate,
        }
        self._go_to(0)

    def _go_to(self, epoch: int, cursor: int = 0) -> None:
        """Make the plan of ``epoch`` and stand at ``cursor``; an iteration under way is over."""
        rng = np.random.default_rng([self._seed, epoch, 1])  # not the plan's, which has no third number
        windows = self._store.windows(self._max_sequence_length, self._truncate, rng)
        plan = plan_epoch(windows.num_events, windows.num_sets, self._policy, seed=self._seed, epoch=epoch)
        cost = self._cost.of(windows.num_events, windows.num_sets)
        self.epoch, self.cursor, self.plan = epoch, cursor, plan
        self._windows = windows
        self._share = deal(plan, cost, rank=self._rank, world_size=self._world_size)
        self._labelled = plan.totals(self._store.label != UNLABELLED)
        self._sets = plan.totals(windows.num_sets)
        self._events = plan.totals(windows.num_events)
        self._iteration = object()

    @property
    def num_patients(self) -> int:
        """Patients of the split, over all ranks."""
        return self._store.num_patients

    @property
    def longest_patient(self) -> int:
        """Most events of a patient of the split, after truncation: the width that fits every batch."""
        return int(self._windows.num_events.max(initial=0))

    def __len__(self) -> int:
        """Batches of the current epoch from its start, equal on every rank; exact."""
        return self.plan.num_batches

    def step_counts(self, step: int) -> StepCounts:
        """Global counts of batch ``step`` of the current epoch, known to every rank without communication."""
        return StepCounts(
            num_patients=int(self.plan.batch_sizes[step]),
            num_labelled=int(self._labelled[step]),
            num_sets=int(self._sets[step]),
            num_events=int(self._events[step]),
        )

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
            "plan": self._plan_fingerprint(),
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
        place = (self.epoch, self.cursor)
        self._go_to(state["epoch"], state["cursor"])
        if state["plan"] != self._plan_fingerprint():
            self._go_to(*place)
            raise UserError("cannot resume: equal settings give other batches; use the NumPy version of the saved run")

    def _plan_fingerprint(self) -> str:
        digest = hashlib.sha256(self.plan.order.tobytes())
        digest.update(self.plan.batch_offsets.tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Generator[PatientBatch, None, None]:
        """Batches from the place to the end of the epoch."""
        return self._hand_out(self._ragged())

    def padded(self) -> Generator[dict[str, Tensor], None, None]:
        """The same batches as ``to_padded()`` gives them, made without that detour."""
        return self._hand_out(self._padded())

    def _hand_out(self, made: Generator[T, None, None]) -> Generator[T, None, None]:
        self._iteration = iteration = object()
        with closing(_ahead(made, self._prefetch)) as batches:
            for batch in batches:
                if self._iteration is not iteration:
                    raise RuntimeError("the loader went elsewhere, or another iteration began, during this one")
                self.cursor += 1
                yield batch
        if self._iteration is iteration:
            self._go_to(self.epoch + 1)

    def _ragged(self) -> Generator[PatientBatch, None, None]:
        """This rank's batches from the place on."""
        first, share, windows = self.cursor, self._share, self._windows
        events_before = offsets_of(share.totals(windows.num_events))
        while first < share.num_batches:
            # The most steps within GATHER_EVENTS, but at least one.
            stop = int(np.searchsorted(events_before, events_before[first] + GATHER_EVENTS, side="right")) - 1
            offsets = share.batch_offsets[first : (first := max(stop, first + 1)) + 1]
            for batch in self._store.ragged(windows, share.order[offsets[0] : offsets[-1]], offsets - offsets[0]):
                yield batch.pin_memory() if self._pin_memory else batch

    def _padded(self) -> Generator[dict[str, Tensor], None, None]:
        share, windows = self._share, self._windows
        for step in range(self.cursor, share.num_batches):
            padded = self._store.padded(windows, share.patients(step))
            yield {name: tensor.pin_memory() for name, tensor in padded.items()} if self._pin_memory else padded


def _ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """``items``, made by a thread that is at most ``depth`` of them ahead; 0 makes each when it is asked for.

    An exception in the thread is raised where its item would have come.  Closing, or dropping, the generator ends the
    thread.
    """
    if depth == 0:
        yield from items
        return
    ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()  # an item, a failure, or the end
    free = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        try:
            free.acquire()
            with closing(items):
                for item in items:
                    ready.put((item,))
                    free.acquire()
                    if closed.is_set():
                        return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (message := ready.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            free.release()
            yield message[0]
    finally:
        closed.set()
        free.release()
        thread.join()


def make_loader(
    directory: str | Path | Folder,
    *,
    manifest: Manifest | None = None,
    quarantined: Collection[str] = (),
    split: str = "train",
    batch_size: int | None = 16,
    max_events: int | None = None,
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
    prefetch: int = 2,
    pin_memory: bool = False,
    verify: bool = True,
) -> PatientLoader:
    """A loader over one split of a data directory.

    Batches, their order and their content depend on the data, ``seed``, the epoch and the grouping flags; not on
    ``rank``, ``world_size``, ``prefetch``, nor on what was loaded before.

    Args:
        directory: what preprocess.py wrote: a path, a URL, or what :func:`pipeline.remote.open_folder` gave.
        manifest: that of the directory, where it has been read already.
        quarantined: paths of shards to leave out, as :func:`pipeline.shards.check_shards` finds them; it must be
            equal on all ranks.
        split: ``train``, ``valid`` or ``test``.
        batch_size: most patients of a global batch, or None.
        max_events: most events of a global batch, or None; see :class:`pipeline.plan.Policy`.
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
        prefetch: batches made ahead by a thread; 0 for no thread.
        pin_memory: give page-locked tensors, for copies to a GPU that do not block.
        verify: compare the shards' checksums with the manifest's.

    Raises:
        UserError: the data cannot be used, or a flag is out of range.
    """
    for flag, number, least in (
        ("max_sequence_length", max_sequence_length, 1),
        ("seed", seed, 0),
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
        bucket_by=bucket_by if bucketing else None,
        bucket_width=bucket_width,
        shuffle=shuffle,
    )
    folder = open_folder(directory)
    manifest = (manifest or Manifest.load(folder)).without(quarantined)
    return PatientLoader(
        PatientStore(folder, manifest, split, verify=verify),
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
        prefetch=prefetch,
        pin_memory=pin_memory,
    )
