from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import make_loader
from pipeline.dataset.manifest import Manifest
from pipeline.loading.batch import PatientBatch
from pipeline.loading.loader import PatientLoader
from pipeline.loading.place import BatchPlace, GlobalBatch, StepCounts
from pipeline.schema import MANIFEST_FILE, UserError
from tests.data_dirs import Patient, in_stored_order, make_patients, write_data_dir
from tests.faults.conftest import cases
from tests.pipeline.loading.test_batch import assert_equal, batch_of

ROOT = Path(__file__).parents[3]
Ids = list[list[str]]


def ids(batches: Iterable[PatientBatch]) -> Ids:
    return [batch.patient_id for batch in batches]


def joined(batches: Iterable[PatientBatch]) -> list[str]:
    return list(chain.from_iterable(ids(batches)))


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not prefetch_threads()


def test_batches_hold_what_the_shards_hold(data_dir: Path, patients: list[Patient]) -> None:
    by_id = {patient.patient_id: patient for patient in patients}
    seen = Counter[str]()
    for batch in make_loader(data_dir, batch_size=6):
        assert_equal(batch, batch_of([by_id[name] for name in batch.patient_id]))
        seen.update(batch.patient_id)
    assert seen == Counter(by_id.keys())


def test_evaluation_is_in_order_of_events(data_dir: Path, patients: list[Patient]) -> None:
    loader = make_loader(data_dir, batch_size=10, shuffle=False)
    expected = [patient.patient_id for patient in in_stored_order(patients)]
    for _ in range(2):
        assert joined(loader) == expected


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_the_transform_makes_is_handed_out(data_dir: Path, prefetch: int) -> None:
    flags: dict[str, Any] = {"batch_size": 7, "max_sequence_length": 20, "truncate": "random", "prefetch": prefetch}
    threads = set[str]()

    def pad(batch: PatientBatch, place: BatchPlace) -> tuple[dict[str, torch.Tensor], int]:
        threads.add(threading.current_thread().name)
        return batch.to_padded(), place.cursor

    ragged, padded = make_loader(data_dir, **flags), make_loader(data_dir, **flags, transform=pad)
    for number, (batch, (tensors, cursor)) in enumerate(zip(ragged, padded, strict=True)):
        assert cursor == number
        for name, tensor in batch.to_padded().items():
            assert torch.equal(tensors[name], tensor), name
    assert ragged.state_dict() == padded.state_dict()
    assert threads == {"prefetch" if prefetch else "MainThread"}


def place_of(batch: PatientBatch, place: BatchPlace) -> tuple[BatchPlace, GlobalBatch, PatientBatch]:
    return place, place.global_batch(), batch


@settings(max_examples=cases(15, 30))
@given(
    world_size=st.integers(1, 4),
    prefetch=st.sampled_from([0, 3]),
    flags=st.sampled_from(
        [
            {},
            {"batch_size": 5, "group_events": 440},
            {"max_sequence_length": 7, "truncate": "latest"},
            {"max_events": 150, "group_events": 700, "max_sequence_length": 30, "truncate": "random"},
        ]
    ),
)
def test_a_place_tells_of_the_batches_of_all_ranks(
    data_dir: Path, world_size: int, prefetch: int, flags: dict[str, Any]
) -> None:
    loaders = [
        make_loader(data_dir, **flags, rank=rank, world_size=world_size, prefetch=prefetch, transform=place_of)
        for rank in range(world_size)
    ]
    step = 0
    for epoch in range(2):
        for cursor, parts in enumerate(zip(*(iter(loader) for loader in loaders), strict=True)):
            batches = [batch for _, _, batch in parts]
            counts = StepCounts(
                num_patients=sum(batch.num_patients for batch in batches),
                num_labelled=(sum(int((batch.label >= 0).sum()) for batch in batches),),
                num_sets=sum(batch.num_sets for batch in batches),
                num_events=sum(batch.num_events for batch in batches),
            )
            sets = {
                name: sizes.tolist()
                for batch in batches
                for name, sizes in zip(
                    batch.patient_id, batch.set_sizes.split(batch.sets_per_patient.tolist()), strict=True
                )
            }
            for place, whole, batch in parts:
                assert (place.epoch, place.cursor, place.step, place.counts) == (epoch, cursor, step, counts)
                assert sorted(whole.sample_key) == sorted(sets)
                assert whole.num_sets.tolist() == [len(sets[name]) for name in whole.sample_key]
                assert whole.set_size.tolist() == [size for name in whole.sample_key for size in sets[name]]
                assert [name for name in whole.sample_key if name in batch.patient_id] == batch.patient_id
                assert whole.sample_key == parts[0][1].sample_key
            step += 1
            assert all(loader.step == step for loader in loaders)


def test_steps_go_on_over_epochs_jumps_and_resumes(data_dir: Path) -> None:
    def steps(batch: PatientBatch, place: BatchPlace) -> tuple[int, int, int]:
        return place.step, place.epoch, place.cursor

    loader, resumed = (make_loader(data_dir, transform=steps) for _ in range(2))  # four batches an epoch
    assert [step for step, _, _ in (*loader, *loader)] == list(range(8))
    loader.set_epoch(5)
    assert list(islice(loader, 2)) == [(8, 5, 0), (9, 5, 1)]
    assert loader.step == 10
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for other in (loader, resumed):
        assert list(other) == [(10, 5, 2), (11, 5, 3)]
        assert next(iter(other)) == (12, 6, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_global_batches_depend_on_neither_ranks_nor_prefetch(
    data_dir: Path, world_size: int, prefetch: int, batch_size: int
) -> None:
    reference = [sorted(batch) for batch in ids(make_loader(data_dir, batch_size=batch_size, prefetch=0))]
    shares = [
        list(make_loader(data_dir, batch_size=batch_size, rank=rank, world_size=world_size, prefetch=prefetch))
        for rank in range(world_size)
    ]
    assert [sorted(joined(parts)) for parts in zip(*shares, strict=True)] == reference
    assert any(batch.num_patients == 0 for share in shares for batch in share) == (
        batch_size < world_size or 53 % batch_size < world_size
    )
    for share in shares:
        for batch in share:
            assert batch.to_padded()["code"].shape[0] == batch.num_patients


def test_what_was_loaded_before_does_not_matter(data_dir: Path) -> None:
    walked, jumped = make_loader(data_dir), make_loader(data_dir)
    for _ in range(3):
        list(walked)
    jumped.set_epoch(3)
    assert (walked.epoch, jumped.epoch) == (3, 3)
    assert ids(walked) == ids(jumped)


@settings(max_examples=cases(15, 40))
@given(
    stops=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    worlds=st.permutations([1, 2, 4, 3]),
    policy=st.sampled_from(
        [
            {},
            {"batch_size": 5},
            {"max_events": 150},
            {"max_sequence_length": 9, "truncate": "random"},
            {"batch_size": 5, "group_events": 440},
            {"max_events": 150, "group_events": 700, "max_sequence_length": 30, "truncate": "random"},
        ]
    ),
)
def test_resuming_equals_no_interruption(
    data_dir: Path, stops: list[int], worlds: list[int], policy: dict[str, Any]
) -> None:
    """Handed out in several runs, each with another number of ranks: the global batches of one undisturbed run."""

    def run(world_size: int, state: dict[str, Any] | None, most: int) -> tuple[list[tuple[int, list[str]]], Any]:
        loaders = [make_loader(data_dir, **policy, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        handed: list[tuple[int, list[str]]] = []
        states = [state]
        while len(handed) < most:
            epoch = loaders[0].epoch
            streams = [iter(loader) for loader in loaders]
            for parts in zip(*streams, strict=True):
                handed.append((epoch, sorted(joined(parts))))
                states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
                if len(handed) == most:
                    break
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]
        assert all(other == states[0] for other in states)
        return handed, states[0]

    expected, _ = run(1, None, sum(stops))
    handed: list[tuple[int, list[str]]] = []
    state = None
    for world_size, most in zip(worlds, stops, strict=False):
        part, state = run(world_size, state, most)
        handed += part
    assert handed == expected


def test_the_place_counts_what_was_handed_out_not_what_is_ready(data_dir: Path) -> None:
    loader = make_loader(data_dir, batch_size=4, prefetch=8)
    stream = iter(loader)
    for count in range(1, 4):
        next(stream)
        assert (loader.epoch, loader.cursor) == (0, count)
    stream.close()
    whole = ids(make_loader(data_dir, batch_size=4))
    assert ids(loader) == whole[3:], "leaving an iteration keeps the place"
    assert (loader.epoch, loader.cursor) == (1, 0)


def test_a_state_after_the_last_batch_resumes_to_an_epoch_with_none_left(data_dir: Path) -> None:
    loader, other = make_loader(data_dir), make_loader(data_dir)
    stream = iter(loader)
    for _ in range(len(loader)):
        next(stream)
    other.load_state_dict(loader.state_dict())
    stream.close()
    assert (other.epoch, other.cursor) == (0, len(loader))
    assert list(other) == []
    assert (other.epoch, other.cursor) == (1, 0)


def test_set_epoch_of_the_current_epoch_keeps_the_place(data_dir: Path) -> None:
    loader = make_loader(data_dir)
    whole = ids(make_loader(data_dir))
    next(iter(loader))
    loader.set_epoch(0)
    assert ids(loader) == whole[1:]
    loader.set_epoch(0)
    assert ids(loader) == whole


def test_two_iterations_at_once_are_refused(data_dir: Path) -> None:
    loader = make_loader(data_dir, batch_size=4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="another iteration began"):
        next(first)
    loader.set_epoch(5)
    with pytest.raises(RuntimeError, match="went elsewhere"):
        next(second)
    assert (loader.epoch, loader.cursor) == (5, 0)


def test_the_state_is_small_and_plain(data_dir: Path) -> None:
    loader = make_loader(data_dir, max_events=1000, max_sequence_length=50, group_events=1000)
    assert len(json.dumps(loader.state_dict())) <= 1024


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 8}, "batch_size was 16 and is now 8"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"split": "valid"}, "split was train and is now valid"),
        ({"bucketing": False}, "bucketing was True and is now False"),
        ({"max_sequence_length": 5}, "max_sequence_length was None and is now 5"),
        ({"shuffle": False}, "shuffle was True and is now False"),
    ],
)
def test_a_state_of_another_plan_is_refused(data_dir: Path, flags: dict[str, Any], message: str) -> None:
    state = make_loader(data_dir).state_dict()
    other = make_loader(data_dir, **flags)
    with pytest.raises(UserError, match=f"cannot resume: {message}"):
        other.load_state_dict(state)
    assert (other.epoch, other.cursor) == (0, 0)


def test_a_state_of_other_data_is_refused(data_dir: Path, tmp_path: Path) -> None:
    other = write_data_dir(tmp_path, {"train": make_patients([[2], [3]])})
    with pytest.raises(UserError, match="cannot resume: data was"):
        make_loader(other).load_state_dict(make_loader(data_dir).state_dict())


def test_a_plan_made_otherwise_is_refused(data_dir: Path) -> None:
    loader = make_loader(data_dir)
    state = loader.state_dict() | {"plan": "0" * 64, "cursor": 2}
    with pytest.raises(UserError, match="equal settings give other batches"):
        loader.load_state_dict(state)
    assert loader.cursor == 0
    with pytest.raises(UserError, match="loader state of version None"):
        loader.load_state_dict({})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_splits_of_no_and_of_one_patient(data_dir: Path, prefetch: int) -> None:
    empty, single = (make_loader(data_dir, split=split, prefetch=prefetch) for split in ("test", "valid"))
    assert (len(empty), empty.num_samples, empty.longest_patient, list(empty)) == (0, 0, 0, [])
    assert empty.epoch == 1
    assert (len(single), ids(single), single.longest_patient) == (1, [["v0/ü"]], 5)


@pytest.mark.parametrize("leave", ["close", "drop", "error"])
def test_the_thread_ends_when_the_consumer_leaves(data_dir: Path, leave: str) -> None:
    stream: Generator[PatientBatch, None, None] | None = iter(make_loader(data_dir, batch_size=2, prefetch=1))
    assert stream is not None
    next(stream)
    assert len(prefetch_threads()) == 1
    if leave == "close":
        stream.close()
    elif leave == "error":
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError())
    else:
        stream = None
    assert not prefetch_threads()


def test_the_thread_is_no_more_than_the_promised_batches_ahead(data_dir: Path) -> None:
    made = threading.Semaphore(0)

    def counted(batch: PatientBatch, place: BatchPlace) -> PatientBatch:
        made.release()
        return batch

    stream = iter(make_loader(data_dir, batch_size=2, prefetch=3, transform=counted))
    next(stream)
    for _ in range(4):
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.05), "one handed out, three ahead, and no more"
    stream.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_failure_reaches_the_consumer_where_its_batch_would_have_come(data_dir: Path, prefetch: int) -> None:
    def fail(batch: PatientBatch, place: BatchPlace) -> PatientBatch:
        if place.cursor == 2:
            raise MemoryError("no more")
        return batch

    loader = make_loader(data_dir, batch_size=4, prefetch=prefetch, transform=fail)
    stream = iter(loader)
    assert len(list(islice(stream, 2))) == 2
    with pytest.raises(MemoryError, match="no more"):
        next(stream)
    assert (loader.cursor, loader.step) == (2, 2)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("group_events", [440, 10**6])
def test_an_iteration_that_is_continued_after_a_fork_raises(data_dir: Path, prefetch: int, group_events: int) -> None:
    program = f"""
import os, sys, warnings
from pathlib import Path
from pipeline import make_loader
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own: a process with threads is forked
flags = {{"batch_size": 2, "prefetch": {prefetch}, "group_events": {group_events}}}
loader, expected = (make_loader(Path(sys.argv[1]), **flags) for _ in range(2))
stream = iter(loader)
next(stream)
child = os.fork()
if not child:
    try:
        next(stream)
    except RuntimeError as error:
        assert "os.fork()" in str(error)
        again = next(iter(loader))  # a new iteration of the new process, from the place
        os._exit(0 if again.patient_id == list(expected)[1].patient_id else 3)
    os._exit(4)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert len(list(stream)) == 26
"""
    subprocess.run([sys.executable, "-c", program, str(data_dir)], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"batch_size": None}, "give --batch_size, --max_events or both"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"group_events": 0}, "--group_events must be at least 1, not 0"),
        ({"prefetch": -1}, "--prefetch must be at least 0, not -1"),
        ({"max_sequence_length": 0}, "--max_sequence_length must be at least 1, not 0"),
        ({"truncate": "middle"}, "--truncate must be earliest or latest or random, not 'middle'"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not among 2 ranks"),
        ({"world_size": 0}, "--world_size 0"),
        ({"split": "dev"}, "no split 'dev'"),
    ],
)
def test_a_flag_out_of_range_is_refused(data_dir: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loader(data_dir, **flags)


def test_an_option_that_there_is_not_is_named(data_dir: Path) -> None:
    with pytest.raises(TypeError, match="bucket_by"):
        make_loader(data_dir, bucket_by="sets")


def test_a_missing_manifest_and_a_damaged_shard_are_named(data_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shard = copy / Manifest.load(copy).splits["train"][3].path
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    loader = make_loader(copy)
    assert len(loader) == 4, "a plan reads no shard"
    with pytest.raises(UserError, match=f"{shard}: checksum differs"):
        next(iter(loader))
    assert make_loader(copy, split="valid").num_samples == 1
    (copy / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match="no manifest here"):
        make_loader(copy)


def test_quarantined_shards_are_in_no_plan_and_a_state_knows_of_them(data_dir: Path, patients: list[Patient]) -> None:
    paths = [entry.path for entry in Manifest.load(data_dir).splits["train"]]
    some = make_loader(data_dir, quarantined=[paths[8], paths[2]])
    left = [patient.patient_id for place, patient in enumerate(in_stored_order(patients)) if place // 5 not in (2, 8)]
    assert Counter(joined(some)) == Counter(left)
    make_loader(data_dir, quarantined=[paths[2], paths[8]]).load_state_dict(some.state_dict())
    for others in ([], paths[2:3], paths[1:3]):
        with pytest.raises(UserError, match=r"cannot resume: quarantined was \['train/00002.parquet', 'train/00008"):
            make_loader(data_dir, quarantined=others).load_state_dict(some.state_dict())


def test_many_batches_are_gathered_together_or_one_by_one_alike(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = list(make_loader(data_dir, batch_size=4))
    monkeypatch.setattr("pipeline.loading.groups.GATHER_EVENTS", 1)
    for batch, alone in zip(together, make_loader(data_dir, batch_size=4), strict=True):
        assert_equal(batch, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_batches_are_pinned_where_asked(data_dir: Path) -> None:
    loader: PatientLoader = make_loader(data_dir, transform=lambda batch, place: batch.pin_memory())
    assert all(batch.code.is_pinned() and batch.set_offsets.is_pinned() for batch in loader)
    assert not any(batch.code.is_pinned() for batch in make_loader(data_dir))
