"""The loader over a split that it does not hold as a whole: the guarantees of ``test_loader``, group after group."""

from __future__ import annotations

import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.loading.loader
from pipeline import make_loader
from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.loading.groups import GroupPlan, LoadedGroup, Position
from pipeline.loading.loader import PatientLoader
from pipeline.loading.options import Truncate
from pipeline.loading.store import PatientStore
from pipeline.sampling.cost import CostModel
from pipeline.schema import INDEX_FILE, UserError
from pipeline.storage.ahead import AheadFolder
from pipeline.storage.files import file_sha256
from pipeline.storage.folder import Folder
from tests.data_dirs import Patient, make_patients, write_data_dir
from tests.faults.conftest import cases
from tests.pipeline.loading.test_batch import assert_equal, batch_of
from tests.pipeline.loading.test_loader import ids, joined, prefetch_threads

GROUP_EVENTS = 440
"""Of the 53 patients' 1,747 events, so four groups."""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, patients: list[Patient]) -> Path:
    """The 53 patients in 11 shards that are alike."""
    return write_data_dir(tmp_path_factory.mktemp("data"), {"train": patients}, dealt=True)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not prefetch_threads()


def num_groups(loader: PatientLoader) -> int:
    return loader._planner.grouping(loader.epoch).num_groups


def load_group(loader: PatientLoader, plan: GroupPlan) -> LoadedGroup:
    return loader._load_group(plan, AheadFolder(loader._folder, 0))


def walk(loader: PatientLoader) -> list[int]:
    """The group of each batch of the rest of an epoch."""
    return [loader._group.position.number for _ in loader]


@settings(max_examples=cases(25, 60))
@given(
    group_events=st.integers(1, 2000),
    batch_size=st.integers(1, 20),
    max_events=st.none() | st.integers(100, 300),
    flags=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 99),
            "shuffle": st.booleans(),
            "bucketing": st.booleans(),
            "max_sequence_length": st.none() | st.integers(1, 60),
            "truncate": st.sampled_from(["earliest", "latest", "random"]),
            "prefetch": st.sampled_from([0, 2]),
        }
    ),
)
def test_every_patient_once_an_epoch_in_as_many_batches_as_promised(
    data_dir: Path,
    patients: list[Patient],
    group_events: int,
    batch_size: int,
    max_events: int | None,
    flags: dict[str, Any],
) -> None:
    loader = make_loader(data_dir, group_events=group_events, batch_size=batch_size, max_events=max_events, **flags)
    by_id = {patient.patient_id: patient for patient in patients}
    longest = min(flags["max_sequence_length"] or 1000, max(patient.num_events for patient in patients))
    assert loader.longest_patient == longest
    for epoch in range(2):
        promised = len(loader)
        batches = []
        for batch in loader:
            assert loader.epoch == epoch
            assert len(loader) == promised, "at any place of the epoch"
            batches.append(batch)
        assert len(batches) == promised
        assert Counter(chain.from_iterable(ids(batches))) == Counter(by_id.keys())
        if flags["max_sequence_length"] is None:
            for batch in batches:
                assert_equal(batch, batch_of([by_id[name] for name in batch.patient_id]))
        else:
            for batch in batches:
                events = [min(by_id[name].num_events, flags["max_sequence_length"]) for name in batch.patient_id]
                assert batch.events_per_patient.tolist() == events
        sizes = [batch.num_patients for batch in batches]
        if max_events is None:
            assert sorted(sizes)[1:] == [batch_size] * (promised - 1), "one smaller batch an epoch, not one a group"
        else:
            assert all(batch.num_events <= max_events for batch in batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("flags", [{"batch_size": 5}, {"max_events": 150}])
def test_global_batches_depend_on_neither_ranks_nor_prefetch(
    data_dir: Path, world_size: int, prefetch: int, flags: dict[str, Any]
) -> None:
    flags = {"group_events": GROUP_EVENTS, **flags}
    reference = make_loader(data_dir, prefetch=0, **flags)
    assert num_groups(reference) == 4
    loaders = [
        make_loader(data_dir, **flags, rank=rank, world_size=world_size, prefetch=prefetch)
        for rank in range(world_size)
    ]
    for _ in range(2):
        shares = [list(loader) for loader in loaders]
        assert [sorted(joined(parts)) for parts in zip(*shares, strict=True)] == [
            sorted(batch) for batch in ids(reference)
        ]


def test_patients_of_a_batch_are_of_one_group_and_groups_change_with_the_epoch(data_dir: Path) -> None:
    loader = make_loader(data_dir, batch_size=5, group_events=GROUP_EVENTS)
    members: list[dict[int, set[str]]] = []
    for _ in range(2):
        members.append({number: set() for number in range(4)})
        for batch in loader:
            members[-1][loader._group.position.number].update(batch.patient_id)
    assert all(len(names) % 5 == 0 for number, names in members[0].items() if number < 3)
    assert members[0] != members[1]


def test_without_groups_there_is_one_and_its_batches_are_those_of_any_limit_beyond(data_dir: Path) -> None:
    few, whole = make_loader(data_dir, group_events=10**6), make_loader(data_dir)
    for _ in range(2):
        assert ids(few) == ids(whole)
    few.load_state_dict(whole.state_dict())


def test_evaluation_is_the_same_every_epoch_and_sorted_within_a_group(data_dir: Path) -> None:
    loader = make_loader(data_dir, batch_size=5, shuffle=False, group_events=GROUP_EVENTS)
    epochs = [ids(loader) for _ in range(2)]
    assert epochs[0] == epochs[1]
    lengths: dict[int, list[int]] = {number: [] for number in range(4)}
    for batch in loader:
        lengths[loader._group.position.number] += batch.events_per_patient.tolist()
    for of_group in lengths.values():
        assert of_group == sorted(of_group)
        assert len(of_group) > 5


def test_ranks_take_turns_over_the_whole_epoch(tmp_path: Path) -> None:
    """Batches of 5 over 4 ranks: the one with two patients is the next one at every step, also at a border."""
    data = write_data_dir(tmp_path, {"train": make_patients([[2]] * 75)})
    for rank in range(4):
        loader = make_loader(data, batch_size=5, group_events=50, rank=rank, world_size=4)
        assert num_groups(loader) == 3
        assert [batch.num_patients for batch in loader] == [2 if step % 4 == rank else 1 for step in range(15)]


def test_each_group_has_chances_of_its_own(tmp_path: Path) -> None:
    data = write_data_dir(tmp_path, {"train": make_patients([[9]] * 80)}, shard_size=20)
    loader = make_loader(data, batch_size=5, group_events=180, max_sequence_length=4, truncate="random")
    groups = {
        number: load_group(loader, loader._planner.plan_group(Position(0, number, 4 * number))) for number in range(4)
    }
    for number, group in groups.items():
        assert group.plan.shards == (loader._planner.grouping(0).shard_order[number],), "a shard each, all alike"
        for other in range(number):
            assert group.plan.batches.order.tolist() != groups[other].plan.batches.order.tolist()
            assert group.windows.event_start.tolist() != groups[other].windows.event_start.tolist()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Paths of the shards of each store that a loader reads, in order."""
    read: list[list[str]] = []

    def noted(directory: Path, entries: list[ShardEntry], **options: Any) -> PatientStore:
        read.append([entry.path for entry in entries])
        return PatientStore(directory, entries, **options)

    monkeypatch.setattr(pipeline.loading.loader, "PatientStore", noted)
    return read


def test_a_split_of_one_group_is_read_once(data_dir: Path, reads: list[list[str]]) -> None:
    loader = make_loader(data_dir)
    for _ in range(3):
        list(loader)
    assert len(reads) == 1


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("flags", [{"batch_size": 5}, {"max_events": 150}])
def test_resuming_reads_the_group_that_the_place_is_in_and_no_other(
    data_dir: Path, reads: list[list[str]], prefetch: int, flags: dict[str, Any]
) -> None:
    flags = {"group_events": GROUP_EVENTS, "prefetch": prefetch, **flags}
    walked = make_loader(data_dir, **flags)
    stream = iter(walked)
    while walked._group.position.number < 2:
        next(stream)
    state, expected = walked.state_dict(), ids(stream)
    resumed = make_loader(data_dir, **flags)
    reads.clear()
    resumed.load_state_dict(state)
    assert not reads
    stream = iter(resumed)
    first = next(stream).patient_id
    group = resumed._planner.grouping(0).group(2)
    assert reads[0] == [resumed._planner.entries[shard].path for shard in group.shards]
    assert [first, *ids(stream)] == expected


def test_resuming_at_a_border_goes_on_with_the_next_group(data_dir: Path) -> None:
    walked, resumed = (make_loader(data_dir, batch_size=5, group_events=GROUP_EVENTS) for _ in range(2))
    stream = iter(walked)
    for _ in range(walked._group.next_position.first_step):
        next(stream)
    assert walked._group.position.number == 0
    resumed.load_state_dict(walked.state_dict())
    assert ids(resumed) == ids(stream)
    assert resumed.state_dict() == walked.state_dict()


def test_a_state_of_other_groups_is_refused(data_dir: Path) -> None:
    loader = make_loader(data_dir, group_events=GROUP_EVENTS)
    next(iter(loader))
    state = loader.state_dict()
    for other, message in ((300, "440 and is now 300"), (10**6, "440 and is now None")):
        with pytest.raises(UserError, match=f"cannot resume: group_events was {message}"):
            make_loader(data_dir, group_events=other).load_state_dict(state)
    with pytest.raises(UserError, match="equal settings give other batches"):
        loader.load_state_dict(state | {"group": 1, "first_step": 1})
    assert (loader.epoch, loader.cursor, loader._group.position.number) == (0, 1, 0)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_more_than_two_groups_are_in_memory(data_dir: Path, prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[PatientStore] = weakref.WeakSet()
    most = []

    class Counted(PatientStore):
        def __init__(self, *given: Any, **flags: Any) -> None:
            alive.add(self)
            super().__init__(*given, **flags)
            most.append(len(alive))

    monkeypatch.setattr(pipeline.loading.loader, "PatientStore", Counted)
    loader = make_loader(data_dir, batch_size=5, group_events=GROUP_EVENTS, prefetch=prefetch)
    for _ in range(3):
        list(loader)
    assert max(most) == 2
    assert len(most) == 3 * 4 + 1


def test_the_next_group_is_read_while_one_is_used_and_no_further(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(data_dir, batch_size=2, group_events=GROUP_EVENTS, prefetch=1)
    read, done = LoadedGroup.read, threading.Semaphore(0)
    loaded: list[tuple[int, int]] = []

    def noted(group: LoadedGroup, folder: Folder, batch: int | None = None) -> None:
        read(group, folder, batch)
        if batch is None:
            loaded.append(group.plan.position[:2])
            done.release()

    monkeypatch.setattr(LoadedGroup, "read", noted)
    stream = iter(loader)
    next(stream)
    for _ in range(2):  # the one in use, which is there already, and the next
        assert done.acquire(timeout=10)
    assert loaded == [(0, 0), (0, 1)]
    assert not done.acquire(timeout=0.05), "one group ahead, and no more"
    list(stream)
    assert loaded == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)], "at the end the next epoch's first is there"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_shard_damaged_in_a_later_group_is_named_at_that_group_s_first_step(
    data_dir: Path, tmp_path: Path, prefetch: int
) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    loader = make_loader(copy, batch_size=5, group_events=GROUP_EVENTS, prefetch=prefetch)
    grouping = loader._planner.grouping(0)
    before = {shard for number in (0, 1) for shard in grouping.group(number).shards.tolist()}
    damaged = next(shard for shard in grouping.group(2).shards.tolist() if shard not in before)
    shard = copy / Manifest.load(copy).splits["train"][damaged].path
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    handed = []
    with pytest.raises(UserError, match=f"{shard}: checksum differs"):
        handed.extend(loader)
    first_step = int(grouping.borders[2]) // 5
    assert (loader.epoch, loader.cursor) == (0, first_step)
    assert loader.state_dict()["group"] == 1


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_plans_places_and_costs_read_no_shard(patients: list[Patient], tmp_path: Path, suffix: str) -> None:
    data = write_data_dir(tmp_path, {"train": patients}, suffix=suffix, dealt=True)
    flags: dict[str, Any] = {"max_events": 150, "max_sequence_length": 20, "truncate": "random"}
    whole = make_loader(data, group_events=GROUP_EVENTS, **flags)
    steps = len(walk(whole))
    state = whole.state_dict()
    shutil.rmtree(data / "train")
    loader = make_loader(data, group_events=GROUP_EVENTS, **flags)
    assert (len(loader), loader.longest_patient) == (steps, 20)
    cost = CostModel(event=1, set=0, set_squared=0, patient=0, batch=2)
    assert loader.predict_costs(cost).tolist() == (loader.plan.sum_per_batch(loader._group.num_events) + 2).tolist()
    loader.load_state_dict(state)
    assert (loader.epoch, loader.cursor, loader.step) == (1, 0, steps)
    with pytest.raises(UserError, match=r"\.(parquet|tar): is missing"):
        next(iter(loader))


@given(max_sequence_length=st.none() | st.integers(1, 60), truncate=st.sampled_from(["earliest", "latest", "random"]))
def test_planned_sets_are_exact_or_with_truncation_an_upper_bound(
    data_dir: Path, max_sequence_length: int | None, truncate: Truncate
) -> None:
    loader = make_loader(
        data_dir, group_events=GROUP_EVENTS, max_sequence_length=max_sequence_length, truncate=truncate
    )
    windows, plan = load_group(loader, loader._group).windows, loader._group
    assert windows.num_events.tolist() == plan.num_events.tolist()
    assert (windows.num_sets <= plan.num_sets).all()
    if max_sequence_length is None:
        assert windows.num_sets.tolist() == plan.num_sets.tolist()


def test_an_index_that_is_not_of_the_shards_is_refused(data_dir: Path, tmp_path: Path) -> None:
    """The lengths of two patients of one shard are exchanged, and the checksum is right."""
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    index = pq.read_table(copy / INDEX_FILE)
    swapped = [1, 0, *range(2, index.num_rows)]
    for name in ("num_events", "num_sets"):
        index = index.set_column(
            index.schema.get_field_index(name), index.schema.field(name), index[name].take(swapped)
        )
    pq.write_table(index, copy / INDEX_FILE)
    manifest = Manifest.load(copy)
    files = manifest.files | {INDEX_FILE: file_sha256(copy / INDEX_FILE)}
    loader = make_loader(copy, task=None, manifest=replace(manifest, files=files))
    with pytest.raises(UserError, match=r"index\.parquet, or the task: contradicts the shards"):
        list(loader)
