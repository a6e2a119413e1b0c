"""Runs whose epochs do not use each sample once: resumed, counted, and refused by name where flags contradict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.dataset.joined import JoinedFolder
from pipeline.dataset.manifest import Manifest
from pipeline.loading.loader import make_loader
from tests.data_dirs import make_patients, write_data_dir
from tests.training.runs import assert_same, read_metrics, read_summary, run, untimed, weights, write_tiny_data
from tests.training.test_resume import Killed, killed_in
from training.data import BatchPreparer, DataOptions, agree_on_data
from training.folds import final_members, fold_members, select_patients
from training.options import CrossFitOptions, RunOptions, TrainOptions, parse_train_options
from training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second place, whose patients are called as in the first."""
    sizes = [[1 + (5 * i + k) % 9 for k in range(1 + i % 6)] for i in range(19)]
    splits = {name: make_patients(sizes, seed=9, prefix=name) for name in ("train", "valid")}
    return write_data_dir(tmp_path_factory.mktemp("other"), splits)


def test_a_killed_run_that_mixes_and_balances_ends_as_another_and_counts(
    data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_dir", str(other), "--data_weights", "1", "2", "--sampling", "balanced", "--checkpoint_steps", "5"]
    flags += ["--preset", "small"]
    assert run(data, tmp_path / "whole", *flags) == 0
    lines = [line for line in read_metrics(tmp_path / "whole") if line.get("event") == "sampling"]
    assert [(line["step"], line["epoch"], line["samples"]) for line in lines] == [(0, 0, 45), (8, 1, 45)]
    assert all((line["data_set_1"], line["data_set_2"]) == (15, 30) for line in lines)
    assert all(abs(line["class_0"] - line["class_1"]) <= 2 for line in lines)
    drawn = {name: value for name, value in lines[1].items() if name not in ("kind", "event", "step", "epoch")}
    assert read_summary(tmp_path / "whole")["drawn_in_last_epoch"] == drawn
    assert "epoch 1 draws samples: 45, different samples: " in capsys.readouterr().err

    with killed_in("train_step", after=11), pytest.raises(Killed):
        run(data, tmp_path / "killed", *flags)
    assert run(data, tmp_path / "killed", *flags, "--resume") == 0
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert untimed(read_summary(tmp_path / "killed")) == untimed(read_summary(tmp_path / "whole"))
    again = [line for line in read_metrics(tmp_path / "killed") if line.get("event") == "sampling"]
    assert again == lines

    options = parse_train_options(["--config", str(tmp_path / "whole" / "config.yaml"), "--output_dir", "again"])
    assert options.data.data_dir == (str(data), str(other))
    assert (options.data.sampling, options.data.data_weights) == ("balanced", (1, 2))


def test_counts_after_event_dropout_are_exact_also_of_copies_on_other_ranks(data: Path) -> None:
    """Three positives of which many copies share a batch: their noise is the same, and so is what all ranks count."""
    flags: dict[str, Any] = {"batch_size": 20, "sampling": "balanced"}
    preparer = BatchPreparer(seed=3, event_dropout=0.4)
    loaders = [make_loader(data, rank=rank, world_size=2, transform=preparer, **flags) for rank in (0, 1)]
    alone = make_loader(data, transform=preparer, **flags)
    for whole, *shares in zip(alone, *loaders, strict=True):
        assert all(share.counts == whole.counts for share in shares)
        assert sum(share.batch.num_events for share in shares) == whole.batch.num_events == whole.counts.num_events
        assert sum(share.batch.num_sets for share in shares) == whole.counts.num_sets


def test_a_fold_is_balanced_by_the_labels_of_whom_it_learns_from(data: Path) -> None:
    options = TrainOptions(
        data=DataOptions(data_dir=str(data), sampling="balanced"),
        run=RunOptions(output_dir="-"),
        cross_fit=CrossFitOptions(folds=2),
    )
    whole = agree_on_data(options.data, Manifest.load(options.data.open_folder()), ALONE, "default")
    everyone = set[str]()
    for member, count in zip([*fold_members(options), *final_members(options)], (19, 19, 38), strict=True):
        own = select_patients(whole, member, options)
        loader = own.open_loader("train", world=ALONE, **own.sampling)
        label = np.concatenate([batch.label for batch in loader])
        assert len(label) == count
        assert abs((label == 0).sum() - (label == 1).sum()) <= 1
        answered = [name for batch in own.open_loader("valid", world=ALONE) for name in batch.patient_id]
        assert not everyone & {*answered}
        everyone |= {*answered}
    assert len(everyone) == 38, "validation is natural"


def test_validation_and_the_moments_of_features_use_each_sample_once(data: Path) -> None:
    options = DataOptions(data_dir=str(data), sampling="balanced")
    folder = options.open_folder()
    found = agree_on_data(options, Manifest.load(folder), ALONE, "default", "train", "valid")
    for split, count in (("train", 26), ("valid", 12)):
        names = [n for b in found.open_loader(split, world=ALONE) for n in b.patient_id]
        assert len(set(names)) == len(names) == count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampling", "balanced", "--share_windows"], "--share_windows"),
        (["--sampling", "balanced", "--class_weights", "balanced"], "--class_weights balanced"),
        (["--sampling", "balanced", "--objective", "pretrain"], "--sampling balanced is for one task of classes"),
        (["--sampling", "weights"], "--sampling_weights"),
        (["--sampling_weights", "file.csv"], "--sampling weights"),
        (["--sampling", "weights", "--sampling_weights", "none.csv"], "--sampling_weights none.csv: cannot be read"),
        (["--data_weights", "1", "2"], "--data_weights: 2 weights for 1 data sets"),
        (["--data_dir", "DATA"], "names a data set twice"),
        (["--data_dir", "OTHER", "--meds_predictions"], "--meds_predictions"),
    ],
)
def test_flags_that_contradict_are_refused_in_one_line(
    data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    named = {"DATA": str(data), "OTHER": str(other)}
    assert run(data, tmp_path / "run", *(named.get(flag, flag) for flag in flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_several_data_sets_are_opened_as_one_and_one_as_itself(data: Path, other: Path) -> None:
    assert isinstance(DataOptions(data_dir=(str(data), str(other))).open_folder(), JoinedFolder)
    assert str(DataOptions(data_dir=(str(data),)).open_folder()) == str(data)
