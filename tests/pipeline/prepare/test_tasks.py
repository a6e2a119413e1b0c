"""The table of a task is the same, byte for byte, in however many slices labels are read, sorted and joined."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import preprocess
from pipeline.dataset import tables
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task
from pipeline.prepare import arrow_files, count_samples, record_sorter
from pipeline.prepare.sources import label_files, side_files
from pipeline.prepare.sources.labels import read_labels
from pipeline.prepare.tasks import write_task
from pipeline.schema import UserError

NUM_PATIENTS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [f"p{at},{minute},hr,{minute}" for at in range(NUM_PATIENTS) for minute in range(0, 50, 1 + at % 5)]
    (folder / "in.csv").write_text("\n".join(["patient_id,minute,variable,value", *rows]) + "\n")
    flags = ["--split_fractions", "0.6,0.2,0.2", "--workers", "1", "--events_per_shard", "200"]
    assert preprocess.main([str(folder / "in.csv"), "--output", str(folder / "data"), *flags]) == 0
    return folder / "data"


def write(folder: Path, kind: str, has_times: bool) -> Path:
    chance = np.random.default_rng(5)
    number = 600 if has_times else NUM_PATIENTS
    patient = chance.integers(0, NUM_PATIENTS + 3, number) if has_times else np.arange(number) + 3
    label = pl.Series({"binary": chance.integers(-1, 2, number), "multiclass": chance.choice(list("xyz"), number),
                       "regression": chance.normal(size=number)}[kind])  # fmt: skip
    frame = pl.DataFrame({"patient_id": [f"p{at}" for at in patient], "label": label})
    if has_times:
        frame = frame.with_columns(prediction_minute=pl.Series(chance.integers(-5, 60, number)))
        frame = frame.unique(["patient_id", "prediction_minute"], keep="first", maintain_order=True)
    folder.mkdir()
    frame[:150].write_parquet(folder / "0.parquet", row_group_size=40)
    frame[150:].write_csv(folder / "1.csv")
    return folder


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("has_times", [True, False])
def test_slices_change_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, has_times: bool
) -> None:
    labels, manifest = write(tmp_path / "labels", kind, has_times), Manifest.load(data)
    monkeypatch.setattr(arrow_files, "ROWS_A_GROUP", 64)
    tasks: list[Task] = []
    for number, rows in enumerate((1 << 20, 7)):
        for module, name in ((count_samples, "SLICE_ROWS"), (label_files, "SLICE_ROWS"), (record_sorter, "RUN_ROWS"),
                             (record_sorter, "STRIDE"), (side_files, "BATCH_ROWS"),
                             (tables, "BATCH_ROWS")):  # fmt: skip
            monkeypatch.setattr(module, name, rows)
        name = f"{kind}-{has_times}-{number}"
        read = read_labels(labels)
        assert read.samples.records.is_in_memory == (number == 0)
        tasks.append(write_task(data, manifest, name, read))
        assert Task.load(data, manifest, name) == tasks[-1]
    whole, sliced = map(asdict, tasks)
    for split in whole["splits"].values():
        for moment in ("mean", "std"):
            split[moment] = split[moment] and pytest.approx(split[moment], rel=1e-12)
    assert sliced | {"name": None} == whole | {"name": None}
    assert sum(split["num_samples"] for split in whole["splits"].values()) > (400 if has_times else 39)
    assert whole["labels_without_patient"] > 0


def test_rows_are_counted_over_all_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_files, "SLICE_ROWS", 2)
    path = tmp_path / "1.csv"
    for rows, message in (
        ("a,1,0\nb,1,0\nc,1,0\nd,1,2.5x\ne,1,1\n", "row 4, column 'label': a label is 0, 1"),
        ("a,1,0\nb,1,0\nc,1,0\nd,1,0\na,1,1\n", "rows 1 to 5 give one sample two labels"),
        ("a,1,0\nb,1,0\nc,x,0\n", "row 3, column 'prediction_minute': neither"),
        ("a,1,0\nb,1,0\nc,1,0\n,2,0\n", "row 4 has no patient_id"),
    ):
        path.write_text("patient_id,prediction_minute,label\n" + rows)
        with pytest.raises(UserError, match=message):
            read_labels(path)
    path.write_text("patient_id,prediction_minute,label\na,1,0\nb,2,1\nc,2150-01-01,1\n")  # a date decides
    with pytest.raises(UserError, match="row 1, column 'prediction_minute': neither"):
        read_labels(path)
