"""``--export``: a checkpoint as a model folder that predicts what the checkpoint does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import model
import train
import training
from model.config import Outcome, SeqSetVAEConfig
from model.losses import LossOptions
from model.seqsetvae import SeqSetVAE
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task
from pipeline.loading.loader import make_loader
from pipeline.options import to_dict
from tests.training.runs import write_tiny_data
from training.checkpoint import Checkpoint
from training.data import DataOptions
from training.options import RunOptions, TrainOptions

BINARY = (Outcome(),)
SHAPE: dict[str, Any] = {"embedding_dim": 8, "width": 16, "set_feed_forward": 20, "feed_forward": 12, "levels": 1}


def write_checkpoint(
    path: Path, data: Path, members: int = 1, /, outcomes: tuple[Outcome, ...] = BINARY, **changes: Any
) -> Path:
    """A checkpoint of untrained models; ``changes`` are those of the data options, ``objective`` of the loss."""
    manifest = Manifest.load(data)
    torch.manual_seed(0)
    config = SeqSetVAEConfig.preset("small", num_codes=manifest.num_codes, outcomes=outcomes, **SHAPE)
    states = [SeqSetVAE(config).state_dict() for _ in range(members)]
    loss = LossOptions(objective=changes.pop("objective", "joint"))
    options = TrainOptions(data=DataOptions(data_dir=str(data), **changes), run=RunOptions(output_dir="run"), loss=loss)
    state: dict[str, Any] = {"ema_model": states[0]} if members == 1 else {"members": states}
    saved = {"vocabulary_fingerprint": manifest.vocabulary_fingerprint, "options": to_dict(options)}
    Checkpoint(config=config.to_dict(), state={**state, "progress": {"step": 7}}, **saved).save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("members", [1, 3])
def test_the_folder_predicts_what_the_checkpoint_does(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], members: int
) -> None:
    calibrated = Outcome(prior=(0.9, 0.1), calibration=(1.25, 0.0, -0.5))
    path = write_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt", data, members, outcomes=(calibrated,))
    folder = tmp_path / "deep" / "model"
    flags = ["--data_dir", str(data), "--export", str(folder)]
    assert train.main([*flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{folder}: the model of {path}; model.safetensors, config.json\n"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    loader = make_loader(data, split="test", batch_size=5, shuffle=False)
    trained = training.load_model(path, loader.manifest.vocabulary_fingerprint)
    found = model.load_model(folder)
    for batch in loader:
        left, right = trained(batch), found(batch)
        assert torch.equal(left.probability, right.probability)
        assert torch.equal(left.posterior.logvar, right.posterior.logvar)
    assert train.main([*flags, "--evaluate", str(path), "--no-recalibrate"]) == 0
    plain = model.load_model(folder)
    assert plain.config.outcomes == (dataclasses.replace(calibrated, calibration=()),)


def test_what_the_folder_says(data: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", data, max_sequence_length=9)
    flags = ["--data_dir", str(data), "--evaluate", str(path), "--export", str(tmp_path / "model")]
    assert train.main(flags) == 0
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert described["samples"] == {
        "times": None, "excluded_codes": [], "max_sequence_length": 9, "truncate": "earliest",
    }  # fmt: skip
    assert (described["step"], described["members"], described["objective"]) == (7, 1, "joint")
    assert described["vocabulary"]["variable"][:3] == ["v0", "v1", "v2"]
    assert described["data"] == {"fingerprint": Manifest.load(data).fingerprint, "options": {}}
    assert str(data) not in json.dumps(described)
    other = shutil.copytree(data, tmp_path / "data")
    task = Task.load(other, Manifest.load(other), "default")
    dataclasses.replace(task, excluded_codes=[1, 4], times="minute").save(other)
    assert train.main([*flags[2:], "--data_dir", str(other), "--max_sequence_length", "5"]) == 0
    samples = model.load_model(tmp_path / "model").description["samples"]
    assert samples == {"times": "minute", "excluded_codes": [1, 4], "max_sequence_length": 9, "truncate": "latest"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "nowhere"], "nowhere/checkpoints/best.pt: no such checkpoint"),
        (["--evaluate", "other.pt"], "other.pt: trained with another vocabulary"),
        (["--evaluate", "task.pt"], "has no task 'los'"),
        ([], "--output_dir is missing"),
    ],
)
def test_refusals_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    saved = Checkpoint.load(write_checkpoint(tmp_path / "other.pt", data))
    dataclasses.replace(saved, vocabulary_fingerprint="0").save(tmp_path / "other.pt")
    write_checkpoint(tmp_path / "task.pt", data, outcomes=(Outcome(name="los"),))
    assert train.main(["--data_dir", str(data), "--export", "model", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("model").exists()
