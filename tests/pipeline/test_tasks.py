"""``python -m pipeline.tasks``: tasks come and go, and nothing else changes."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess
from pipeline import make_loader
from pipeline.arrays import offsets_from_sizes
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import TASK_SCHEMA
from pipeline.dataset.tasks import Task, list_tasks, read_task_table
from pipeline.prepare.windows import count_until
from pipeline.schema import UserError
from pipeline.tasks import main
from tests.training.runs import read_folder

ROWS = "patient_id,time,variable,value\n" + "".join(
    f"{patient},2150-01-0{1 + patient % 3} {hour:02d}:{30 * (hour % 2):02d}:{second:02d},hr,{hour}\n"
    for patient in range(12)
    for hour in range(4)
    for second in (0, 20)
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """12 patients with dates: eight events each, in four sets of two that are 20 seconds apart; no labels."""
    (tmp_path / "in.csv").write_text(ROWS)
    flags = ["--split_fractions", "0.5,0.25,0.25", "--workers", "1", "--events_per_shard", "30"]
    assert preprocess.main([str(tmp_path / "in.csv"), "--output", str(tmp_path / "data"), *flags]) == 0
    return tmp_path / "data"


def write_labels(path: Path, samples: list[tuple[int, datetime, int | None]]) -> Path:
    schema = {"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "label": pl.Int64}
    pl.DataFrame(samples, schema, orient="row").write_parquet(path)
    return path


def at(patient: int, hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2150, 1, 1 + patient % 3, hour, minute, second)


def test_tasks_come_and_go_and_nothing_else_changes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_folder(data)
    labels = write_labels(tmp_path / "a.parquet", [(patient, at(patient, 2), patient % 2) for patient in range(12)])
    assert main(["add", str(data), "--name", "first", "--labels", str(labels)]) == 0
    first = read_folder(data)
    assert first.keys() - before.keys() == {"tasks/first.parquet", "tasks/first.json"}
    assert main(["add", str(data), "--name", "second", "--labels", str(labels)]) == 0
    assert {name: content for name, content in read_folder(data).items() if "second" not in name} == first
    capsys.readouterr()
    assert main(["list", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "second" in shown
    assert main(["add", str(data), "--name", "first", "--labels", str(labels)]) == 2
    assert "has a task 'first' already" in capsys.readouterr().err
    assert main(["remove", str(data), "--name", "second"]) == 0
    assert read_folder(data) == first
    assert main(["remove", str(data), "--name", "second"]) == 2
    assert "has no task 'second'; it has first" in capsys.readouterr().err
    assert main(["remove", str(data), "--name", "first"]) == 0
    assert read_folder(data) == before


def test_a_window_ends_with_the_prediction_time_to_the_microsecond(data: Path, tmp_path: Path) -> None:
    """Patient 1 has events at 0:00:00, 0:00:20, 1:30:00, 1:30:20, …"""
    times = [at(1, 1, 30, 20), at(1, 1, 30, 19), at(1, 0) - timedelta(microseconds=1), at(1, 23)]
    labels = write_labels(tmp_path / "a.parquet", [*((1, time, 1) for time in times), (99, times[0], 1)])
    assert main(["add", str(data), "--name", "a", "--labels", str(labels)]) == 0
    manifest = Manifest.load(data)
    task = Task.load(data, manifest, "a")
    table = read_task_table(data, task)
    assert table.schema == TASK_SCHEMA
    lengths = zip(table["num_events"].to_pylist(), table["num_sets"].to_pylist(), strict=True)
    found = dict(zip(table["prediction_time"].to_pylist(), lengths, strict=True))
    assert found == dict(zip(times, [(4, 2), (3, 2), (0, 0), (8, 4)], strict=True))
    minutes = dict(zip(table["prediction_time"].to_pylist(), table["prediction_minute"].to_pylist(), strict=True))
    assert minutes[times[0]] == pytest.approx(90 + 20 / 60)
    assert task.labels_without_patient == 1
    split = table["split"][0].as_py()
    batches = {batch.prediction_time[0]: batch for batch in make_loader(data, task="a", split=split, batch_size=1)}
    assert batches.keys() == {times[0], times[1], times[3]}
    index = pl.read_parquet(data / "vocabulary.parquet").filter(pl.col("variable") == "hr")
    raw = batches[times[1]].value.numpy() * index["std"][0] + index["mean"][0]
    assert raw.tolist() == pytest.approx([0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("patient_id,label\n1,1\n", ["--name", "../x"], "--name '../x': a task's name has letters"),
        ("patient_id,label\n1,1\n", ["--name", ".x"], "a task's name has letters"),
        ("patient_id,label\nnobody,1\n", ["--name", "x"], "names no patient"),
        ("patient_id,label\n1,7\n", ["--name", "x"], "a label is 0, 1"),
        ("patient_id,label\n1,1\n", ["--name", "x", "--exclude_codes", "("], "--exclude_codes (: no regular"),
        ("patient_id,label\n1,1\n", ["--name", "x", "--pseudonymize", "KEY"], "was prepared without a key"),
        ("patient_id,label\n1,1\n", [], "the following arguments are required: --name"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_named_and_leaves_nothing(
    data: Path, tmp_path: Path, text: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv").write_text(text)
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    before, flags = read_folder(data), [str(tmp_path / "key") if flag == "KEY" else flag for flag in flags]
    assert main(["add", str(data), "--labels", str(tmp_path / "labels.csv"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pipeline.tasks: ")
    assert message in error
    assert error.count("\n") == 1
    assert read_folder(data) == before


def test_a_command_that_is_none_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["sort", str(data)]) == main(["list", str(data / "train")]) == 2
    assert "usage: python -m pipeline.tasks add|list|remove DIR" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_damage_to_a_task_is_found_when_it_is_opened(data: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "a.parquet", [(patient, at(patient, 2), 1) for patient in range(12)])
    assert main(["add", str(data), "--name", "a", "--labels", str(labels)]) == 0
    table, description = data / "tasks" / "a.parquet", data / "tasks" / "a.json"
    content, text = table.read_bytes(), description.read_text()
    table.write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(UserError, match=r"tasks/a\.parquet: checksum differs"):
        list(make_loader(data, task="a"))
    table.write_bytes(content)
    for harm in (text.replace('"num_samples": ', '"num_samples": 1'), "{}", "[]", "{"):
        description.write_text(harm)
        with pytest.raises(UserError, match=r"tasks/a\.json: "):
            make_loader(data, task="a")
    description.write_text(text)
    other = json.loads((data / "manifest.json").read_text())
    assert json.loads(text)["data"] == other["fingerprint"]


def test_a_task_of_another_data_set_is_refused(data: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "a.parquet", [(1, at(1, 2), 1)])
    assert main(["add", str(data), "--name", "a", "--labels", str(labels)]) == 0
    flags = ["--split_fractions", "1,0,0", "--workers", "1", "--overwrite"]
    assert preprocess.main([str(tmp_path / "in.csv"), "--output", str(data), *flags]) == 0
    assert list_tasks(data) == [], "it went with the shards that it was over"
    for name in ("a.json", "a.parquet"):
        assert not (data / "tasks" / name).exists()


def test_pseudonyms_of_the_same_key_find_their_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text(ROWS)
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    private = ["--pseudonymize", str(tmp_path / "key")]
    assert (
        preprocess.main([str(tmp_path / "in.csv"), "--output", str(tmp_path / "out"), "--workers", "1", *private]) == 0
    )
    labels = write_labels(tmp_path / "a.parquet", [(patient, at(patient, 2), 1) for patient in range(12)])
    add = ["add", str(tmp_path / "out"), "--name", "a", "--labels", str(labels)]
    assert main(add) == 2
    assert "give its key with --pseudonymize" in capsys.readouterr().err
    assert main([*add, *private]) == 0
    ids = pq.read_table(tmp_path / "out" / "tasks" / "a.parquet")["patient_id"].to_pylist()
    assert len(ids) == 12
    assert all(len(name) == 32 for name in ids)


def test_dates_need_a_data_set_of_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{n},{minute},hr,{n}\n" for n in range(9) for minute in (0, 5))
    (tmp_path / "in.csv").write_text("patient_id,minute,variable,value\n" + rows)
    assert preprocess.main([str(tmp_path / "in.csv"), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    labels = write_labels(tmp_path / "a.parquet", [(1, at(1, 2), 1)])
    assert main(["add", str(tmp_path / "out"), "--name", "a", "--labels", str(labels)]) == 2
    assert "the data set was made of minutes; give prediction_minute" in capsys.readouterr().err


events = st.tuples(st.sampled_from([None, 0.0, 0.5, 1.0, 7.25, 9.0]), st.integers(2, 4))
sets_of_patients = st.lists(
    st.lists(st.lists(events, min_size=1, max_size=3), min_size=1, max_size=4), min_size=1, max_size=4
)


def by_time(event: tuple[float | None, int]) -> tuple[bool, float]:
    return event[0] is not None, event[0] or 0.0


@given(sets_of_patients, st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 8.0, np.inf]), min_size=1), st.booleans())
def test_lengths_against_a_loop(
    patients: list[list[list[tuple[float | None, int]]]], minutes: list[float], exclude: bool
) -> None:
    """Sets in any order, of static and timed events; the window ends before the first event that is later."""
    stored = [[sorted(events, key=by_time) for events in sets] for sets in patients]
    for sets in stored:
        sets.sort(key=lambda events: by_time(events[0]))
    flat = [[event for events in sets for event in events] for sets in stored]
    spread = [any(minute != events[0][0] for events in sets for minute, _ in events) for sets in stored]
    rows = pa.table(
        {
            "num_events": pa.array([len(events) for events in flat], pa.int32()),
            "num_sets": pa.array([len(sets) for sets in stored], pa.int32()),
            "minute": pa.array([[events[0][0] for events in sets] for sets in stored], pa.list_(pa.float64())),
            "set_size": pa.array([[len(events) for events in sets] for sets in stored], pa.list_(pa.int32())),
            "code": pa.array([[code for _, code in events] for events in flat], pa.list_(pa.int32())),
            "event_minute": pa.array(
                [[minute for minute, _ in events] if has else None for events, has in zip(flat, spread, strict=True)],
                pa.list_(pa.float64()),
            ),
        }
    )
    excluded = [3] if exclude else []
    position = np.arange(len(minutes)) % len(patients)
    num_events, num_sets, is_whole = count_until(rows, position, np.array(minutes), np.array(excluded, np.int64))
    for number, minute in enumerate(minutes):
        sets, kept, sets_kept, is_over = stored[position[number]], 0, set(), False
        for at_set, events in enumerate(sets):
            for time, code in events:
                is_over = is_over or (time is not None and time > minute)
                if not is_over and code not in excluded:
                    kept += 1
                    sets_kept.add(at_set)
        assert (num_events[number], num_sets[number]) == (kept, len(sets_kept))
        last_sets = sets[: max(sets_kept, default=-1) + 1]
        assert is_whole[number] == (kept == sum(code not in excluded for events in last_sets for _, code in events))
    assert offsets_from_sizes(num_events).dtype == np.int64
