from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import meds
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_shard
from pipeline.loading.loader import make_loader
from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.sources.auto import detect_format
from pipeline.prepare.sources.meds import Meds
from pipeline.prepare.splits import SplitRule
from pipeline.prepare.tasks import EXCLUDE_CODES
from pipeline.schema import SPLITS, UserError
from tests.faults.conftest import cases
from tests.prepared import Row, assert_same, expected, read_prepared

BIRTH = datetime(1931, 4, 5)
ADMISSION = datetime(2019, 12, 31, 23, 59, 59, 999_999)
ALL_TRAIN = BuildOptions(split_rule=SplitRule(split_fractions=(1.0, 0.0, 0.0)))
HALVES = BuildOptions(split_rule=SplitRule(split_fractions=(0.5, 0.25, 0.25)), events_per_shard=9)

Event = tuple[int | None, datetime | None, str | None, float | None]
Sample = tuple[int, datetime, bool]


def at(minutes: float) -> datetime:
    return ADMISSION + timedelta(minutes=minutes)


def write_events(root: Path, events: Sequence[Event], name: str = "train/0", **columns: Sequence[Any]) -> None:
    """A file of ``data``, checked by the standard's own schema where it can be."""
    subjects, times, codes, values = (list(column) for column in zip(*events, strict=True))
    table = pa.table(
        {
            "subject_id": pa.array(subjects, pa.int64()),
            "time": pa.array(times, pa.timestamp("us")),
            "code": pa.array(codes, pa.string()),
            "numeric_value": pa.array(values, pa.float32()),
            **columns,
        }
    )
    if None not in subjects and None not in codes:
        table = meds.DataSchema.align(table)
        meds.DataSchema.validate(table)
    write(table, root / meds.data_subdirectory / f"{name}.parquet")


def write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_splits(root: Path, splits: dict[int, str]) -> None:
    table = pa.table({"subject_id": list(splits), "split": list(splits.values())})
    meds.SubjectSplitSchema.validate(table)
    write(table, root / meds.subject_splits_filepath)


def write_samples(folder: Path, samples: Sequence[Sample], name: str = "0") -> None:
    subjects, times, labels = (list(column) for column in zip(*samples, strict=True))
    table = pa.table(
        {"subject_id": subjects, "prediction_time": pa.array(times, pa.timestamp("us")), "boolean_value": labels}
    )
    meds.LabelSchema.validate(table)
    write(table, folder / f"{name}.parquet")


def stays(output: Path) -> dict[str, list[tuple[float | None, list[str]]]]:
    """Sets of every patient: minute, and the variables' names."""
    prepared = read_prepared(output)
    names = [row[0] for row in prepared.vocabulary]
    return {
        patient: [(minute, [names[code] for code, _ in events]) for minute, events in sets]
        for split in SPLITS
        for patient, _, sets in prepared.patients[split]
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two subjects as the standard has them: a whole history, and one without any time."""
    events: list[Event] = [
        (1, None, "EYES//BROWN", None),
        (1, None, "GENDER//F", None),
        (1, BIRTH, meds.birth_code, None),
        (1, at(0), "HOSPITAL_ADMISSION", None),
        (1, at(0.5), "HR", 80.0),
        (1, at(61.0), "HR", 100.0),
        (1, at(62.0), "HOSPITAL_DISCHARGE//DIED", None),
        (1, at(63.0), meds.death_code, None),
        (2, None, "GENDER//F", None),
    ]
    write_events(tmp_path / "in", events, text_value=pa.array(["x"] * len(events), pa.large_string()))
    codes = {
        "code": ["HR", "HR", "HR", "GENDER//F", "EYES//BROWN"],
        "description": ["Heart rate", "beats a minute", "Heart rate", None, ""],
        "parent_codes": [["LOINC/8867-4"], None, None, None, None],
    }
    table = meds.CodeMetadataSchema.align(pa.table(codes))
    meds.CodeMetadataSchema.validate(table)
    write(table, tmp_path / "in" / meds.code_metadata_filepath)
    return tmp_path / "in"


def test_a_data_set_by_hand(root: Path, tmp_path: Path) -> None:
    assert detect_format(root) == "meds"
    summary = build(Meds(path=root), tmp_path / "out", ALL_TRAIN)
    birth = (BIRTH - ADMISSION) / timedelta(minutes=1)
    assert stays(tmp_path / "out") == {
        "1": [
            (None, ["EYES//BROWN", "GENDER//F"]),
            (birth, ["MEDS_BIRTH"]),
            (0.0, ["HOSPITAL_ADMISSION", "HR"]),
            (61.0, ["HR"]),
            (62.0, ["HOSPITAL_DISCHARGE//DIED"]),
            (63.0, ["MEDS_DEATH"]),
        ],
        "2": [(None, ["GENDER//F"])],
    }
    assert summary["rejects"] == {}
    assert summary["events_in"] == 9
    vocabulary = pl.read_parquet(tmp_path / "out" / "vocabulary.parquet")
    assert dict(vocabulary.select("variable", "description").iter_rows()) == {
        "<padding>": None, "<unknown>": None, "EYES//BROWN": None, "GENDER//F": None, "HOSPITAL_ADMISSION": None,
        "HR": "Heart rate; beats a minute", "MEDS_BIRTH": None, "HOSPITAL_DISCHARGE//DIED": None, "MEDS_DEATH": None,
    }  # fmt: skip
    assert Manifest.load(tmp_path / "out").options["exclude_codes"] == []


def test_the_static_set_has_the_minute_of_the_next_set_in_a_batch(root: Path, tmp_path: Path) -> None:
    build(Meds(path=root), tmp_path / "out", ALL_TRAIN)
    (batch,) = make_loader(tmp_path / "out", task=None, split="train", batch_size=2, shuffle=False)
    birth = np.float32((BIRTH - ADMISSION) / timedelta(minutes=1))
    stays = dict(zip(batch.patient_id, np.split(batch.minute.numpy(), batch.patient_offsets[1:-1]), strict=True))
    assert stays["1"].tolist() == [birth, birth, 0, 61, 62, 63]
    assert stays["2"].tolist() == [0]


def test_the_static_set_is_the_same_from_a_tar(root: Path, tmp_path: Path) -> None:
    build(Meds(path=root), tmp_path / "out", BuildOptions(split_rule=ALL_TRAIN.split_rule, shard_format="both"))
    manifest = Manifest.load(tmp_path / "out")
    parquet, tar = (read_shard(tmp_path / "out", shards["train"][0]) for shards in (manifest.splits, manifest.tars))
    assert parquet.minute.tolist() == tar.minute.tolist()
    assert sorted(parquet.minute.tolist())[2:] == [0, 0, 61, 62, 63]


def test_no_digit_of_a_time_is_lost_over_a_century(tmp_path: Path) -> None:
    times = [at(-60 * 24 * 365.0 * 100), at(0), ADMISSION + timedelta(microseconds=1)]
    write_events(tmp_path / "in", [(1, times[0], meds.birth_code, None), *((1, time, "HR", 1.0) for time in times[1:])])
    build(Meds(path=tmp_path / "in"), tmp_path / "out", ALL_TRAIN)
    (((_, _, sets),),) = [read_prepared(tmp_path / "out").patients["train"]]
    shown = [ADMISSION + timedelta(microseconds=round((minute or 0) * 60e6)) for minute, _ in sets]
    assert shown == times[:2]
    assert len(sets[1][1]) == 2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"exclude_codes": EXCLUDE_CODES}, ["HR", "HOSPITAL_ADMISSION"]),
        ({}, ["HR", "HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE//DIED", "MEDS_DEATH"]),
        ({"exclude_codes": ("^H",)}, ["MEDS_DEATH"]),
    ],
)
def test_codes_that_give_the_outcome_away(root: Path, tmp_path: Path, options: dict[str, Any], kept: list[str]) -> None:
    build(Meds(path=root, **options), tmp_path / "out", ALL_TRAIN)
    found = {name for sets in stays(tmp_path / "out").values() for _, names in sets for name in names}
    assert found - {"EYES//BROWN", "GENDER//F", "MEDS_BIRTH"} == set(kept)


@pytest.mark.parametrize(
    ("code", "excluded"),
    [
        ("MEDS_DEATH", True), ("MEDS_DEATH//HOSPITAL", True), ("ICU_DISCHARGE//MICU", True), ("Death", True),
        ("TRANSFER_TO//discharge//UNKNOWN", True), ("MEDS_BIRTH", False), ("HR", False), ("DISCHARGED?", False),
        ("Minute volume expired", False),
    ],
)  # fmt: skip
def test_the_default_list_of_excluded_codes(tmp_path: Path, code: str, excluded: bool) -> None:
    write_events(tmp_path, [(1, at(0), code, None)])
    source = Meds(path=tmp_path, exclude_codes=EXCLUDE_CODES)
    (raw,) = source.read(source.pieces()[0])
    ((reason, rule),) = raw.rules
    assert reason == "excluded_code"
    assert raw.rows.select(rule).to_series().to_list() == [excluded]


def test_minutes_may_count_from_a_code_of_one_s_own(root: Path, tmp_path: Path) -> None:
    write_events(root, [(3, at(5), "GENDER//M", None), (3, None, "GENDER//M", None)], "held_out/deep/er/1")
    summary = build(Meds(path=root, origin_code="HR"), tmp_path / "out", ALL_TRAIN)
    found = stays(tmp_path / "out")
    assert [minute for minute, _ in found["1"]][2:] == [-0.5, 0.0, 60.5, 61.5, 62.5]
    assert found["3"] == [(None, ["GENDER//M"])]
    assert summary["rejects"] == {"no_origin": 1}
    rejects = pl.read_parquet(tmp_path / "out" / "rejects.parquet").filter(pl.col("reason") == "no_origin")
    assert rejects.select("file", "row", "patient_id", "minute", "variable").rows() == [
        ("data/held_out/deep/er/1.parquet", 1, "3", None, "GENDER//M")
    ]


def test_birth_is_the_origin_where_there_is_nothing_else(tmp_path: Path) -> None:
    write_events(
        tmp_path / "in", [(1, BIRTH, "MEDS_BIRTH", None), (2, BIRTH, "MEDS_BIRTH//X", 1.0), (2, at(0), "A", 1)]
    )
    build(Meds(path=tmp_path / "in"), tmp_path / "out", ALL_TRAIN)
    assert stays(tmp_path / "out")["1"] == [(0.0, ["MEDS_BIRTH"])]
    assert stays(tmp_path / "out")["2"][1] == (0.0, ["A"])


def read_samples(output: Path) -> dict[tuple[str, datetime], tuple[int, int, bool]]:
    """Number of events, number of sets and label of each sample of the task ``default``."""
    rows = pq.read_table(output / "tasks" / "default.parquet").to_pylist()
    return {
        (row["patient_id"], row["prediction_time"]): (row["num_events"], row["num_sets"], row["label"]) for row in rows
    }


def test_samples_end_with_their_prediction_time_and_events_are_written_once(root: Path, tmp_path: Path) -> None:
    task = tmp_path / "task"
    samples: list[Sample] = [(1, at(0.25), False), (1, at(61), True), (1, at(-60), True), (7, at(0), True)]
    write_samples(task, samples, "held_out/0")
    write_samples(task, samples[:2], "again")  # the same samples twice
    summary = build(Meds(path=root, labels=task), tmp_path / "out", ALL_TRAIN)
    assert read_samples(tmp_path / "out") == {
        ("1", at(0.25)): (4, 3, False),  # two static events, birth and the admission; HR is half a minute later
        ("1", at(61)): (6, 4, True),
        ("1", at(-60)): (3, 2, True),
    }
    build(Meds(path=root), tmp_path / "plain", ALL_TRAIN)
    for name in ("train/00000.parquet", "index.parquet", "vocabulary.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert summary["labels_without_patient"] == 1  # subject 7
    assert summary["events_in"] == summary["events_written"] == 9
    assert pq.read_table(tmp_path / "out" / "index.parquet")["time_origin"].to_pylist() == [None, at(0)]

    only = build(Meds(path=root, labels=task, labelled_only=True), tmp_path / "only", ALL_TRAIN)
    assert stays(tmp_path / "only").keys() == {"1"}
    assert only["rejects"]["no_sample"] == 1


def test_a_static_set_alone_knows_no_later_minute(root: Path, tmp_path: Path) -> None:
    """A whole patient's static set has the minute of the next set, which a sample that ends before it does not see."""
    write_samples(tmp_path / "task", [(1, BIRTH - timedelta(days=1), True), (1, BIRTH, False)])
    build(Meds(path=root, labels=tmp_path / "task"), tmp_path / "out", ALL_TRAIN)
    batches = make_loader(tmp_path / "out", batch_size=1, shuffle=False)
    minutes = [batch.minute.tolist() for batch in batches]
    birth = np.float32((BIRTH - ADMISSION) / timedelta(minutes=1))
    assert minutes == [[0], [birth, birth]]


def test_a_whole_patient_is_without_the_codes_that_tell_the_outcome(root: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("subject_id,label\n1,1\n2,0\n")
    build(Meds(path=root, labels=tmp_path / "labels.csv"), tmp_path / "out", ALL_TRAIN)
    names = pl.read_parquet(tmp_path / "out" / "vocabulary.parquet")["variable"]
    seen = {names[code] for batch in make_loader(tmp_path / "out") for code in batch.code.tolist()}
    assert seen == {"EYES//BROWN", "GENDER//F", "HOSPITAL_ADMISSION", "HR", "MEDS_BIRTH"}
    every = {names[code] for batch in make_loader(tmp_path / "out", task=None) for code in batch.code.tolist()}
    assert every - seen == {"HOSPITAL_DISCHARGE//DIED", "MEDS_DEATH"}


def test_given_splits_hold_for_all_samples_of_a_subject(tmp_path: Path) -> None:
    root, task = tmp_path / "in", tmp_path / "task.parquet"
    write_events(root, [(subject, at(0), "HR", 1.0) for subject in range(8)])
    write_splits(root, {0: "train", 1: "train", 2: "tuning", 3: "held_out", 4: "train", 5: "train", 6: "tuning"})
    write_samples(tmp_path, [(subject, at(minute), True) for subject in (0, 2, 3) for minute in (1, 2)], "task")
    summary = build(Meds(path=root, labels=task), tmp_path / "out", ALL_TRAIN)
    found = {
        split: {name for name, *_ in patients} for split, patients in read_prepared(tmp_path / "out").patients.items()
    }
    assert found == {"train": {"0", "1", "4", "5", "7"}, "valid": {"2", "6"}, "test": {"3"}}
    assert summary["patients"] == 8
    assert {split: counts["num_samples"] for split, counts in summary["samples"].items()} == {
        "train": 2, "valid": 2, "test": 2,
    }  # fmt: skip
    assert summary["patients_split_by_hash"] == 1  # subject 7
    other = {0: "b", 1: "a", 2: "b", 3: "a", 4: "a", 5: "a", 6: "a"}
    write_splits(root, other)
    with pytest.raises(UserError, match=r"subject_splits\.parquet: row 1 has split 'b', not one of train"):
        build(Meds(path=root), tmp_path / "refused", ALL_TRAIN)
    build(Meds(path=root, split_map=(("a", "train"), ("b", "test"))), tmp_path / "mapped", ALL_TRAIN)
    assert {name for name, *_ in read_prepared(tmp_path / "mapped").patients["test"]} == {"0", "2"}


events = st.tuples(
    st.sampled_from([1, 2, 3, 4, None]),
    st.sampled_from([None, BIRTH, *(at(minute) for minute in (0, 0.25, 0.75, 1, 1.5, 90, 60 * 24 * 400))]),
    st.sampled_from(["MEDS_BIRTH", "MEDS_DEATH", "HR", "RR", "ü", " ", None]),
    st.sampled_from([None, math.nan, math.inf, 0.0, 1.5, -80.25]),
)
samples = st.dictionaries(
    st.tuples(st.sampled_from([1, 2, 3, 9]), st.sampled_from([at(minute) for minute in (-1, 0, 1, 90)])), st.booleans()
)


def rows_of(events: Sequence[Event], times: dict[int, list[datetime]]) -> list[Row]:
    """Canonical rows from events one by one: a patient a subject, and one a sample, ``<subject>@<time>``."""
    rows: list[Row] = []
    for subject in {subject for subject, *_ in events}:
        mine = [event for event in events if event[0] == subject]
        usable = [
            (time, code)
            for _, time, code, value in mine
            if time and code and code.strip() and not (value is not None and math.isinf(value))
        ]
        after_birth = [time for time, code in usable if code != "MEDS_BIRTH"]
        origin = min(after_birth or [time for time, _ in usable], default=ADMISSION)
        for _, time, code, value in mine:
            minute = None if time is None else (time - origin) // timedelta(microseconds=1) / 60e6
            patient = None if subject is None else str(subject)
            rows.append((patient, minute, code, value))
            ends = times.get(subject, []) if subject is not None else []
            rows += [(f"{patient}@{end}", minute, code, value) for end in ends if time is None or time <= end]
    return rows


@settings(max_examples=cases(25, 60))
@given(st.lists(events, min_size=1, max_size=50), samples)
def test_messy_events_become_what_the_naive_reference_says(
    events: list[Event], samples: dict[tuple[int, datetime], bool]
) -> None:
    times: dict[int, list[datetime]] = {}
    for subject, time in samples:
        times.setdefault(subject, []).append(time)
    naive = expected(rows_of(events, {}), HALVES.split_rule, {}, static=True)
    with_samples = expected(rows_of(events, times), HALVES.split_rule, {}, static=True)
    lengths = {
        name: (sum(len(items) for _, items in sets), len(sets))
        for split in SPLITS
        for name, _, sets in with_samples.patients[split]
    }
    written = {name for split in SPLITS for name, *_ in naive.patients[split]}
    with TemporaryDirectory() as name:
        root, output = Path(name, "in"), Path(name, "out")
        for number, part in enumerate((events[: len(events) // 2], events[len(events) // 2 :])):
            if part:
                write_events(root, part, str(number))
        if samples:
            write_samples(root / "task", [(*sample, label) for sample, label in samples.items()])
        source = Meds(path=root, labels=root / "task" if samples else None)
        nobody = bool(samples) and not {str(subject) for subject, _ in samples} & written
        if nobody or not any(count for _, count, *_ in naive.vocabulary):
            with pytest.raises(UserError, match=r"task: names no patient|train split|no row can be used"):
                build(source, output, HALVES)
            return
        summary = build(source, output, HALVES)
        assert_same(read_prepared(output), naive)
        found = read_samples(output) if samples else {}
    assert summary["events_in"] == len(events) == summary["events_written"] + sum(summary["rejects"].values())
    assert found == {
        (str(subject), time): (*lengths.get(f"{subject}@{time}", (0, 0)), label)
        for (subject, time), label in samples.items()
        if str(subject) in written
    }
    assert summary["labels_without_patient"] == len(samples) - len(found)


def test_columns_of_every_kind_the_standard_allows(tmp_path: Path) -> None:
    plain = {
        "subject_id": pa.array([1, 1], pa.int64()),
        "time": pa.array([None, ADMISSION], pa.timestamp("us")),
        "code": pa.array(["GENDER", "HR"]),
    }
    kinds: list[dict[str, pa.Array]] = [
        {"numeric_value": pa.array([None, None], pa.float32()), "extra": pa.array([[1], None])},
        {"numeric_value": pa.nulls(2)},
        {"code": plain["code"].dictionary_encode()},
        {"code": plain["code"].cast(pa.large_string()), "time": plain["time"].cast(pa.timestamp("ms"), safe=False)},
        {"time": plain["time"].cast(pa.timestamp("ns", "UTC")), "subject_id": plain["subject_id"].cast(pa.int32())},
    ]
    for number, kind in enumerate(kinds):
        columns = plain | kind | {"subject_id": (plain | kind)["subject_id"].take([0, 0])}
        columns["subject_id"] = pa.array([number] * 2, columns["subject_id"].type)
        write(pa.table(columns), tmp_path / "in" / "data" / f"{number}.parquet")
    build(Meds(path=tmp_path / "in"), tmp_path / "out", ALL_TRAIN)
    assert stays(tmp_path / "out") == {str(number): [(None, ["GENDER"]), (0.0, ["HR"])] for number in range(len(kinds))}


def test_a_large_file_is_read_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Event] = [(number // 10, at(number % 10), "HR", float(number)) for number in range(1000)]
    write_events(tmp_path / "in", rows)
    path = tmp_path / "in" / "data" / "train" / "0.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=37)
    build(Meds(path=tmp_path / "in"), tmp_path / "whole", ALL_TRAIN)
    monkeypatch.setattr("pipeline.prepare.sources.reading.PIECE_BYTES", 1000)
    assert len(Meds(path=tmp_path / "in").pieces()) > 5
    build(Meds(path=tmp_path / "in"), tmp_path / "parts", ALL_TRAIN)
    for name in ("train/00000.parquet", "index.parquet", "vocabulary.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


TASK = {"labels": "task"}


@pytest.mark.parametrize(
    ("file", "table", "options", "message"),
    [
        ("data/0", {"subject_id": [1], "time": [ADMISSION]}, {}, r"0\.parquet: no column 'code'"),
        ("data/0", {"subject_id": ["x"], "time": [ADMISSION], "code": ["HR"]}, {}, "row 1 has a subject_id that is no"),
        ("data/0", {"subject_id": [1], "time": [3.5], "code": ["HR"]}, {}, "'time' holds Float64"),
        ("data/0", {"subject_id": [1], "time": [timedelta(1)], "code": ["HR"]}, {}, "'time' holds Duration"),
        ("metadata/subject_splits", {"subject_id": [1, 1], "split": ["train", "tuning"]}, {}, "number 1 of train is"),
        ("metadata/subject_splits", {"subject_id": [1, 2], "split": ["train", None]}, {}, "row 2 has split None"),
        ("metadata/subject_splits", {"subject_id": [1]}, {}, r"subject_splits\.parquet: no column 'split'"),
        ("metadata/codes", {"description": ["x"]}, {}, r"codes\.parquet: no column 'code'"),
        ("task/0", {"subject_id": [1]}, TASK, r"task/0\.parquet: no column 'label'"),
        ("task/0", {"subject_id": [1], "prediction_time": [None], "boolean_value": [True]}, TASK, "row 1 has no"),
        ("task/0", {"subject_id": [1], "prediction_time": [ADMISSION], "integer_value": [7]}, TASK, "a label is 0, 1"),
        (
            "task/0",
            {"subject_id": [1, 1], "prediction_time": [ADMISSION] * 2, "boolean_value": [True, False]},
            TASK,
            "give one sample two labels",
        ),
        ("task/x/0", {"subject_id": [9], "prediction_time": [ADMISSION], "boolean_value": [True]}, TASK, "names no"),
        ("data/1", {"subject_id": [1], "time": [ADMISSION], "code": ["A"]}, {"exclude_codes": ("(",)}, "no regular"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(
    tmp_path: Path, file: str, table: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    write_events(tmp_path, [(1, at(0), "HR", 1.0)])
    write(pa.table(table), tmp_path / f"{file}.parquet")
    if "labels" in options:
        options = {"labels": tmp_path / "task"}
    with pytest.raises(UserError, match=message):
        build(Meds(path=tmp_path, **options), tmp_path / "out", ALL_TRAIN)
    assert not (tmp_path / "out").exists()


def test_labels_of_another_column(root: Path, tmp_path: Path) -> None:
    table = pa.table({"subject_id": [1], "prediction_time": [at(1)], "integer_value": [1]})
    write(table, tmp_path / "task.parquet")
    source = Meds(path=root, labels=tmp_path / "task.parquet", label_column="integer_value")
    build(source, tmp_path / "out", ALL_TRAIN)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["samples"]["train"]["class_counts"][1] == 1
