from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch

import training as package
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from tests.model.helpers import random_batch, tiny_model
from training import load_model
from training.checkpoint import Checkpoint


def checkpoint(model: SeqSetVAE) -> Checkpoint:
    return Checkpoint(
        config=model.config.to_dict(),
        vocabulary_fingerprint="v",
        options={},
        state={
            "model": model.state_dict(),
            "ema_model": model.state_dict(),
            "optimizer": {},
            "scaler": {},
            "loader": {"epoch": 1},
            "progress": {"step": 3},
        },
    )


def test_a_model_in_one_line(tmp_path: Path) -> None:
    model, path = tiny_model().train(), tmp_path / "best.pt"
    checkpoint(model).save(path)
    loaded = load_model(str(path), "v")
    assert not loaded.training
    batch = random_batch([[2, 3], [1]])
    assert torch.equal(loaded(batch).probability, model.eval()(batch).probability)
    with pytest.raises(UserError, match="another vocabulary"):
        load_model(path, "w")
    with pytest.raises(AttributeError, match="has no attribute 'load_models'"):
        package.load_models  # noqa: B018


def test_round_trip(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "new" / "last.pt"
    checkpoint(model).save(path)
    again = Checkpoint.load(path)
    assert again.step == 3
    batch = random_batch([[2, 3], [1]])
    assert torch.equal(again.build_model(path, "v").eval()(batch).logits[0], model.eval()(batch).logits[0])
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_checkpoint_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    dataclasses.replace(checkpoint(tiny_model()), version=1_000).save(path)
    with pytest.raises(UserError, match=r"last\.pt: checkpoint version 1000, this program reads"):
        Checkpoint.load(path)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another vocabulary"):
        checkpoint(tiny_model()).build_model(tmp_path, "w")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saved = checkpoint(tiny_model())
    with pytest.raises(UserError, match="width is 16 there, 32 here"):
        saved.check_same_model(tmp_path, tiny_model(width=32).config)
    saved.check_same_model(tmp_path, tiny_model().config)
    for config in ({"depth": 3}, {**saved.config, "width": 32}):
        with pytest.raises(UserError, match="another model"):
            dataclasses.replace(saved, config=config).build_model(tmp_path, "v")


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})])
def test_not_a_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt"):
        Checkpoint.load(path)


def test_truncated_missing_and_foreign(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no such checkpoint"):
        Checkpoint.load(path)
    checkpoint(tiny_model()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        Checkpoint.load(path)
    middle = whole.index(b"data/3") + 200
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        Checkpoint.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"not a checkpoint of train\.py"):
        Checkpoint.load(path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/hostile-checkpoint-ran",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": Hostile()}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        Checkpoint.load(path)
    assert not Path("/tmp/hostile-checkpoint-ran").exists()
