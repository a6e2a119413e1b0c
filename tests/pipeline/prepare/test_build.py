from __future__ import annotations

import datetime
import json
import math
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, VOCABULARY_SCHEMA
from pipeline.dataset.shards import read_shard
from pipeline.dataset.tables import read_index, read_vocabulary
from pipeline.prepare.build import build
from pipeline.prepare.executors import ONE_PROCESS, ExecutionOptions, open_executor
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.order import sort_order
from pipeline.prepare.publish import WORK, claim_output_folder
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.physionet2012 import PhysioNet2012
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table
from pipeline.prepare.splits import SplitRule
from pipeline.schema import MANIFEST_FILE, SPLITS, UserError
from tests.faults.conftest import cases
from tests.prepared import Row, assert_same, assign_splits, expected, read_prepared

HALVES = BuildOptions(split_rule=SplitRule(split_fractions=(0.5, 0.25, 0.25)), events_per_shard=7)
ALL_TRAIN = BuildOptions(split_rule=SplitRule(split_fractions=(1.0, 0.0, 0.0)))

messy_rows = st.lists(
    st.tuples(
        st.sampled_from([None, "", " ", "a", "b", "c", "d", "../ü", "e" * 50]),
        st.sampled_from([None, math.nan, math.inf, -math.inf, -3.5, -0.0, 0.0, 0.25, 0.75, 1.0, 2880.0, 1e12]),
        st.sampled_from([None, "", "\t", "HR", "RR", "ü", "a,\"b\"\n"]),
        st.sampled_from([None, math.nan, math.inf, -math.inf, 1e39, -0.0, 0.0, 1.0, 1.5, -80.25, 3e38, 1e-40]),
    ),
    max_size=60,
)  # fmt: skip


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    schema = {"patient_id": pl.String, "minute": pl.Float64, "variable": pl.String, "value": pl.Float64}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path)


def shard_bytes(directory: Path) -> dict[str, bytes]:
    """All files that must not depend on how the work was done; not the report and the summary's times."""
    suffixes = {".parquet", ".tar", ".npy"}
    ours = [path for path in directory.rglob("*") if path.suffix in suffixes or path.name == MANIFEST_FILE]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in ours}


@settings(max_examples=cases(25, 60))
@given(messy_rows, st.dictionaries(st.sampled_from("abcx"), st.sampled_from([0, 1, None])))
def test_messy_rows_become_what_the_naive_reference_says(rows: list[Row], labels: dict[str, int | None]) -> None:
    naive = expected(rows, HALVES.split_rule, labels)
    known = {patient for patient, *_ in rows}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.parquet", rows)
        schema = {"patient_id": pl.String, "label": pl.Int8}
        pl.DataFrame(list(labels.items()), schema=schema, orient="row").write_csv(folder / "labels.csv")
        source = Table(path=folder / "rows.parquet", labels=folder / "labels.csv")
        output = folder / "label=7"  # no column of any shard, whatever a reader makes of such a name
        written = {patient for split in SPLITS for patient, *_ in naive.patients[split]}
        if (labels and not written & labels.keys()) or not any(count for _, count, *_ in naive.vocabulary):
            with pytest.raises(UserError, match=r"labels\.csv|train split|no row can be used"):
                build(source, output, HALVES)
            assert not output.exists()
            return
        summary = build(source, output, HALVES)
        assert_same(read_prepared(output), naive)
        assert summary == json.loads((output / "summary.json").read_text())
    patients = [patient for split in SPLITS for patient in naive.patients[split]]
    assert summary["events_in"] == len(rows) == summary["events_written"] + sum(summary["rejects"].values())
    assert summary["rejects"] == dict(naive.rejects)
    assert summary["patients"] == len(patients)
    samples = summary["samples"].values()
    assert sum(split["num_labelled"] for split in samples) == sum(label is not None for _, label, _ in patients)
    assert sum(split["class_counts"][1] for split in samples) == sum(label == 1 for _, label, _ in patients)
    assert summary["labels_without_patient"] == len(labels.keys() - written)
    without = sorted({name for name in known if name and name.strip()} - {name for name, *_ in patients})
    assert summary["patients_without_events"] == len(without)
    assert summary["patients_without_events_first"] == without
    codes = [code for _, _, sets in patients for _, events in sets for code, _ in events]
    assert summary["unknown_variable_events"] == codes.count(1)


def icu_rows(num_patients: int) -> list[Row]:
    """Many patients, some rows twice, in the order of nothing."""
    rng = np.random.default_rng(1)
    rows: list[Row] = [
        (f"p{patient}", float(minute) / 4, f"v{variable}", None if value > 1 else float(value))
        for patient, minute, variable, value in zip(
            rng.integers(0, num_patients, 3000), rng.integers(-50, 200, 3000), rng.integers(0, 9, 3000),
            rng.normal(size=3000), strict=True,
        )
    ]  # fmt: skip
    rows += [*rows[:300], (None, 1.0, "v0", 1.0), ("p0", math.nan, "v0", 1.0)]
    random.Random(0).shuffle(rows)
    return rows


def test_partitions_are_sorted_shards_that_together_hold_every_patient(tmp_path: Path) -> None:
    rows = icu_rows(60)
    write_rows(tmp_path / "rows.parquet", rows)
    options = BuildOptions(split_rule=HALVES.split_rule, events_per_shard=200)
    build(Table(path=tmp_path / "rows.parquet"), tmp_path / "out", options)
    naive = expected(rows, HALVES.split_rule, {})
    prepared = read_prepared(tmp_path / "out")
    assert len(Manifest.load(tmp_path / "out").splits["train"]) > 5
    for patients in (*prepared.patients.values(), *naive.patients.values()):
        patients.sort(key=lambda patient: patient[0])
    assert_same(prepared, naive)

    manifest = Manifest.load(tmp_path / "out")
    index = read_index(tmp_path / "out", manifest)
    assert index.schema == INDEX_SCHEMA
    assert read_vocabulary(tmp_path / "out", manifest).schema == VOCABULARY_SCHEMA
    expected_index = []
    for split in SPLITS:
        for entry in manifest.splits[split]:
            shard = read_shard(tmp_path / "out", entry)
            sets = np.diff(shard.patient_offsets)
            events = np.diff(shard.set_offsets[shard.patient_offsets])
            keys = list(zip(events.tolist(), sets.tolist(), shard.patient_id.to_pylist(), strict=True))
            assert keys == sorted(keys)
            for position, (num_events, num_sets, patient_id) in enumerate(keys):
                sizes = np.diff(shard.set_offsets)[
                    shard.patient_offsets[position] : shard.patient_offsets[position + 1]
                ]
                expected_index.append(
                    (patient_id, split, entry.path, position, num_events, num_sets, sizes.max(), None)
                )
    assert [tuple(row.values()) for row in index.to_pylist()] == expected_index


def test_the_output_does_not_depend_on_processes_or_on_the_order_of_rows_and_files(tmp_path: Path) -> None:
    rows = icu_rows(40)
    options = BuildOptions(split_rule=HALVES.split_rule, events_per_shard=1000)
    outputs = {}
    for name, order, num_files, workers in (
        ("a", rows, 1, 1),
        ("b", rows[::-1], 3, 1),
        ("c", sorted(rows, key=str), 2, 1),
    ):
        (tmp_path / name).mkdir()
        for number in range(num_files):
            write_rows(tmp_path / name / f"{number}.parquet", order[number::num_files])
        build(
            Table(path=tmp_path / name), tmp_path / f"out_{name}", options, execution=ExecutionOptions(workers=workers)
        )
        outputs[name] = shard_bytes(tmp_path / f"out_{name}")
    for name in "bc":  # all but the rejects' rows, and the manifest's fingerprint of the input
        for path in outputs["a"].keys() - {"rejects.parquet", MANIFEST_FILE}:
            assert outputs[name][path] == outputs["a"][path], path
        assert outputs[name].keys() == outputs["a"].keys()


def test_the_output_is_the_same_for_one_process_and_for_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 20})
    source = Synthetic(num_patients=50)
    assert len(source.pieces()) == 3
    seen: list[tuple[str, int, int, int]] = []

    def progress(stage: str, *, done: int, total: int, rows: int) -> None:
        seen.append((stage, done, total, rows))

    options = BuildOptions(events_per_shard=5000)
    summaries = [
        build(source, tmp_path / "one", options, progress=progress),
        build(source, tmp_path / "two", options, execution=ExecutionOptions(workers=2)),
    ]
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    measured = {"seconds", "events_per_second", "peak_rss_bytes", "sha256"}
    first, second = ({name: summary[name] for name in summary.keys() - measured} for summary in summaries)
    assert first == second
    assert [step[:3] for step in seen if step[0] == "read"] == [
        (
            "read",
            done,
            3,
        )
        for done in range(4)
    ]
    assert seen[-1][0] == "write"
    assert seen[-1][1] == seen[-1][2]
    assert seen[-1][3] == summaries[0]["events_written"]


def test_a_packed_file_is_read_by_one_process_and_sorted_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in.parquet", icu_rows(40))
    opened = []

    def open_here(options: ExecutionOptions, max_workers: int) -> Any:
        opened.append(min(options.workers, max_workers))
        return open_executor(ONE_PROCESS, 1)

    for module in ("build", "stages"):
        monkeypatch.setattr(f"pipeline.prepare.{module}.open_executor", open_here)
    for events_per_shard, wanted in ((50, [1, 2]), (1 << 20, [1])):
        options, output = BuildOptions(events_per_shard=events_per_shard), tmp_path / str(events_per_shard)
        build(Table(path=tmp_path / "in.parquet"), output, options, execution=ExecutionOptions(workers=2))
        assert opened == wanted
        opened.clear()


def test_tars_and_parquet_hold_the_same_shards(tmp_path: Path) -> None:
    source = Synthetic(num_patients=30)
    for shard_format in ("parquet", "webdataset", "both"):
        options = BuildOptions(events_per_shard=5000, shard_format=shard_format)
        build(source, tmp_path / shard_format, options)
    manifests = {name: Manifest.load(tmp_path / name) for name in ("parquet", "webdataset", "both")}
    both = manifests["both"]
    assert both.splits == manifests["parquet"].splits
    assert both.tars == manifests["webdataset"].splits
    assert manifests["parquet"].tars == manifests["webdataset"].tars == {}
    for name, manifest in manifests.items():
        index = read_index(tmp_path / name, manifest)
        assert set(index["shard"].to_pylist()) == {entry.path for split in SPLITS for entry in manifest.splits[split]}
    for split in SPLITS:
        for parquet, tar in zip(both.splits[split], both.tars[split], strict=True):
            assert Path(parquet.path).with_suffix(".tar") == Path(tar.path)
            first, second = (read_shard(tmp_path / "both", entry) for entry in (parquet, tar))
            assert first.patient_id.equals(second.patient_id)
            for field in set(type(first).__slots__) - {"patient_id"}:
                assert getattr(first, field).tobytes() == getattr(second, field).tobytes()


def test_a_variable_that_train_does_not_know_keeps_its_raw_value_under_the_unknown_code(tmp_path: Path) -> None:
    rule = HALVES.split_rule
    by_split = {
        split: next(name for name in map(str, range(99)) if SPLITS[assign_splits(rule, [name])[0]] == split)
        for split in SPLITS
    }
    rows: list[Row] = [
        (name, 0.0, "known", value) for name, value in zip(by_split.values(), (2.0, 4.0, 6.0), strict=True)
    ]
    rows += [
        (by_split["test"], 0.0, "a stranger", 7.5),
        (by_split["test"], 0.0, "zoo", 1.0),
        (by_split["test"], 0.0, "zoo", None),
    ]
    write_rows(tmp_path / "rows.parquet", rows)
    summary = build(Table(path=tmp_path / "rows.parquet"), tmp_path / "out", HALVES)
    prepared = read_prepared(tmp_path / "out")
    assert [row[0] for row in prepared.vocabulary] == ["<padding>", "<unknown>", "known"]
    assert prepared.patients["test"][0][2] == [(0.0, [(1, 7.5), (1, 1.0), (1, None), (2, 4.0)])]  # 6 - 2, std 1
    assert summary["unknown_variable_events"] == 3


def test_given_set_indices_make_the_sets(tmp_path: Path) -> None:
    rows = pl.DataFrame(
        {
            "patient_id": ["p"] * 6,
            "minute": [5.0, 3.0, 3.0, 3.0, 9.0, 3.0],
            "variable": ["b", "a", "c", "a", "d", "a"],
            "value": [1.0] * 6,
            "set_index": [7, 7, 2, 2, 1, 7],
        }
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    summary = build(Table(path=tmp_path / "rows.parquet"), tmp_path / "out", ALL_TRAIN)
    ((_, _, sets),) = read_prepared(tmp_path / "out").patients["train"]
    assert [(minute, [code for code, _ in events]) for minute, events in sets] == [
        (3.0, [2, 4]), (3.0, [2, 3]), (9.0, [5]),
    ]  # fmt: skip
    assert summary["rejects"] == {"duplicate": 1}


def test_a_duplicate_is_rejected_with_the_place_of_the_later_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "1.parquet", [("p", 0.5, "a", 1.25), ("p", 0.5, "b", None)])
    write_rows(tmp_path / "2.parquet", [("q", 0.0, "a", 1.0), ("p", 0.5, "b", math.nan), ("p", 0.5, "a", 1.25)])
    build(Table(path=tmp_path), tmp_path / "out", ALL_TRAIN)
    rejects = pq.ParquetFile(tmp_path / "out" / "rejects.parquet").read().to_pylist()
    assert [tuple(row.values()) for row in rejects] == [
        ("duplicate", "2.parquet", 3, "p", "0.5", "a", "1.25"), ("duplicate", "2.parquet", 2, "p", "0.5", "b", None),
    ]  # fmt: skip


def test_of_many_duplicates_the_first_is_kept(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [(f"p{number % 3}", 0.0, "a", float(number % 5)) for number in range(3000)])
    build(Table(path=tmp_path / "rows.parquet"), tmp_path / "out", ALL_TRAIN)
    rejects = pl.read_parquet(tmp_path / "out" / "rejects.parquet")
    assert sorted(rejects["row"]) == list(range(16, 3001))


def test_minutes_of_dates_count_from_the_patient_s_first_event_in_any_file(tmp_path: Path) -> None:
    """Minutes are whole where the difference is, though absolute float64 minutes of today are not."""
    start = datetime.datetime(2024, 2, 29, 23, 59, 59, 999_999)
    minutes = [0, 1, 7, 30_000]
    for number, part in enumerate((minutes[2:], minutes[:2])):
        rows = [("p", start + datetime.timedelta(minutes=minute), "a", 1.0) for minute in part]
        rows.append(("q", start + datetime.timedelta(days=number), "a", 1.0))
        pl.DataFrame(rows, schema=["patient_id", "time", "variable", "value"], orient="row").write_parquet(
            tmp_path / f"{number}.parquet"
        )
    build(Table(path=tmp_path), tmp_path / "out", ALL_TRAIN)
    stays = {
        patient: [minute for minute, _ in sets]
        for patient, _, sets in read_prepared(tmp_path / "out").patients["train"]
    }
    assert stays == {"p": minutes, "q": [0, 1440]}


def test_pieces_must_be_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"patient_id": ["p"], "minute": [0.0], "variable": ["a"], "value": [1.0]})
    frame.write_parquet(tmp_path / "1.parquet")
    frame.with_columns(set_index=0).write_parquet(tmp_path / "2.parquet")
    for piece_bytes, message in (
        (1, r"2\.parquet gives .*set_index.*1\.parquet gives"),
        (1000, "1.parquet gives .*set_index"),
    ):
        monkeypatch.setattr("pipeline.prepare.sources.reading.PIECE_BYTES", piece_bytes)
        with pytest.raises(UserError, match=message):
            build(Table(path=tmp_path), tmp_path / "out", ALL_TRAIN)


def test_embeddings_and_statistics_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    rows = pl.DataFrame({"variable": ["b", "a", "a"], "value": [1.0, 2.0, 4.0], "minute": [0.0, 0.0, 1.0]})
    rows.write_parquet(tmp_path / "in" / "train" / "1.0.parquet")
    (tmp_path / "in" / "stats.csv").write_text("variable,mean,std\na,10,2\nother,0,1\n")
    (tmp_path / "in" / "cached.csv").write_text("Key,0,1\nz,9,9\nb,3,4\na,1,2\n")
    summary = build(PatientFiles(path=tmp_path / "in"), tmp_path / "out", BuildOptions())
    assert np.load(tmp_path / "out" / "embeddings.npy").tolist() == [[0, 0], [0, 0], [1, 2], [3, 4]]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.embedding_dim == 2
    assert set(manifest.files) == {"embeddings.npy", "index.parquet", "vocabulary.parquet"}
    ((patient, _, sets),) = read_prepared(tmp_path / "out").patients["train"]
    assert patient == "1"
    assert sets == [(0.0, [(2, -4.0), (3, 0.0)]), (1.0, [(2, -3.0)])]
    assert summary["variables_with_given_statistics"] == 1


def test_a_failing_run_leaves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", icu_rows(5))
    (tmp_path / "cached.csv").write_text("Key,0\nv0,1\n")
    source = Table(path=tmp_path / "rows.parquet", embeddings=tmp_path / "cached.csv")
    with pytest.raises(UserError, match=r"cached\.csv: no vector for variable 'v1'"):
        build(source, tmp_path / "out", ALL_TRAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached.csv", "rows.parquet"]


def test_too_little_space_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.parquet", icu_rows(5))
    size = (tmp_path / "rows.parquet").stat().st_size

    class Usage:
        free = 4 * size - 1

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    source = Table(path=tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"out: the work needs at least .* GiB of disk, .* are free"):
        build(source, tmp_path / "out", ALL_TRAIN)
    assert not (tmp_path / "out").exists()
    Usage.free += 1
    build(source, tmp_path / "out", ALL_TRAIN)


class NeverLookedAt(Synthetic):
    """As an input so large that looking at it takes hours."""

    def inputs(self) -> Any:
        raise AssertionError

    def pieces(self) -> Any:
        raise AssertionError


def test_a_folder_is_refused_before_the_input_is_looked_at(tmp_path: Path) -> None:
    for name, message in (
        ("thesis/notes.txt", r"thesis: holds 'notes\.txt' and no data set"),
        (f"odd/{MANIFEST_FILE}", "not a manifest of this project"),
        (f"strange/{WORK}/notes.txt", r"not made by preprocess\.py"),
        ("file", "file: is a file"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=message):
            build(NeverLookedAt(), tmp_path / name.split("/")[0], ALL_TRAIN, overwrite=True)
    with (
        pytest.raises(UserError, match=r"another preprocess\.py is writing here"),
        claim_output_folder(tmp_path / "busy", lambda: "first", overwrite=False, log=print),
    ):
        build(NeverLookedAt(), tmp_path / "busy", ALL_TRAIN)


def test_a_train_split_without_events_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [("p", math.nan, "a", 1.0)])
    with pytest.raises(
        UserError, match=r"rows\.parquet: no row can be used: bad_minute 1 \(column 'minute', as in 'aaa'\)"
    ):
        build(Table(path=tmp_path / "rows.parquet"), tmp_path / "out", ALL_TRAIN)


class DiesWhenRead(Synthetic):
    """As a process that the system kills for want of memory."""

    def read(self, piece: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named_and_what_was_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 1})
    with pytest.raises(ChildProcessError, match="worker process was killed"):
        build(DiesWhenRead(num_patients=2), tmp_path / "out", ALL_TRAIN, execution=ExecutionOptions(workers=2))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK]


def test_set_a(tmp_path: Path, set_a_dir: Path, outcomes_a: Path) -> None:
    source = PhysioNet2012(path=set_a_dir, labels=outcomes_a)
    summary = build(source, tmp_path / "out", BuildOptions())
    assert summary["events_in"] == 1_678_892
    assert summary["events_written"] == 1_672_669
    assert summary["rejects"] == {"missing_code": 2223, "record_id": 4000}
    assert summary["patients"] == 4000
    assert summary["variables"] == 41
    assert summary["sets"] == 292_178
    samples = summary["samples"].values()
    assert [sum(split[name] for split in samples) for name in ("num_samples", "num_labelled")] == [4000, 4000]
    assert sum(split["class_counts"][1] for split in samples) == 554
    assert summary["labels_without_patient"] == summary["patients_without_events"] == 0
    index = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert index["shard"].unique().sort().to_list() == [f"{split}/00000.parquet" for split in sorted(SPLITS)]
    descriptors_only = index.filter(pl.col("patient_id").is_in(["140501", "140936", "141264"]))
    assert descriptors_only.select("num_sets", "num_events").rows() == [(1, 3)] * 3
    assert index["num_events"].median() == 407
    for split in SPLITS:
        lengths = index.filter(pl.col("split") == split)["num_events"]
        assert lengths.is_sorted()


keys_and_ties = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 3, 255]),
        st.sampled_from([-math.inf, -2.0, 0.0, 1.0, 1e12, 2.0**52, 1e18]),
        st.integers(0, 2),
        st.sampled_from([math.nan, -1.5, 0.0, 2.0]),
        st.sampled_from([0.0, 0.25]),
    ),
    max_size=40,
)


@given(keys_and_ties)
def test_the_order_of_events_is_that_of_their_columns(rows: list[tuple[float, ...]]) -> None:
    """Packed into one integer, with the row's number or without, or, where the minutes lie too far apart, not."""
    dtypes = (np.int32, np.float64, np.int32, np.float32, np.float64)
    columns = [np.array([row[at] for row in rows], dtype) for at, dtype in enumerate(dtypes)]

    def place(number: int) -> tuple[float, ...]:
        *key, value, minute = rows[number]
        return (*key, math.isnan(value), 0 if math.isnan(value) else value, minute)

    assert sort_order(columns[:3], columns[3:]).tolist() == sorted(range(len(rows)), key=place)


def test_a_run_that_is_stopped_between_task_and_manifest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(manifest: Manifest, directory: Path) -> None:
        assert (directory / "tasks" / "default.json").exists()
        raise KeyboardInterrupt

    source = Synthetic(num_patients=20)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "out", BuildOptions())
    build(source, tmp_path / "out", BuildOptions())
    build(source, tmp_path / "whole", BuildOptions())
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
