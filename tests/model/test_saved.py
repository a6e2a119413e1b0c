"""Model folders: what comes back is what went in, and what was changed is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import model
from model.config import Outcome
from model.saved import CONFIG_FILE, WEIGHTS_FILE, SavedModel, pack_model
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from tests.model.helpers import NUM_CODES, random_batch, tiny_model

BATCH = random_batch([[3, 1], [5], [2, 2, 4]], seed=1)


def saved_model(*members: SeqSetVAE) -> SavedModel:
    vocabulary = {"code": list(range(NUM_CODES)), "variable": [f"v{code}" for code in range(NUM_CODES)]}
    shape = members[0].config.to_dict()
    return SavedModel(members, {"version": 1, "model": shape, "members": len(members), "vocabulary": vocabulary})


def write(folder: Path, *members: SeqSetVAE) -> Path:
    folder.mkdir()
    for name, content in pack_model(saved_model(*members)).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("number", [1, 3])
def test_outputs_are_the_same_to_the_bit(tmp_path: Path, number: int) -> None:
    outcomes = (
        Outcome(name="a", prior=(0.9, 0.1), calibration=(1.25, 0.0, -0.125), conformal=((0.1, 0.3, 0.2),)),
        Outcome(name="b", kind="regression", classes=(), prior=(7.0,), std=2.5),
    )
    members = [tiny_model(outcomes=outcomes).eval() for _ in range(number)]
    for at, member in enumerate(members):
        with torch.no_grad():
            for weight in member.parameters():
                weight.mul_(1 + 0.1 * at)
    expected = saved_model(*members)(BATCH)
    found = model.load_model(write(tmp_path / "model", *members))
    assert not found.training
    assert found.config == members[0].config
    assert found.vocabulary["variable"][8] == "v8"
    output = found(BATCH)
    assert all(map(torch.equal, output.predictions, expected.predictions))
    assert torch.equal(output.posterior.mu, members[0](BATCH).posterior.mu)
    if number == 1:
        assert all(map(torch.equal, output.predictions, members[0](BATCH).predictions))


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(content | values))

    return change


def change_weight(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def lose_checksum(folder: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(version=2), "of version 2, this program reads 1"),
        (change_config(members=2), "not as it was written"),
        (change_config(vocabulary={}), "not as it was written"),
        (change_weight, "not as it was written"),
        (lose_checksum, "not as it was written"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), "no model folder, model.safetensors is missing"),
        (lambda folder: (folder / CONFIG_FILE).unlink(), "no model folder, config.json is missing"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[1]"), "cannot be read as a model folder"),
        (lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff{"), "cannot be read as a model folder"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x00" * 20), "cannot be read as a model folder"),
    ],
)
def test_a_changed_folder_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    folder = write(tmp_path / "model", tiny_model())
    change(folder)
    with pytest.raises(UserError, match=re.escape(message)) as found:
        model.load_model(folder)
    assert str(found.value).startswith(f"{folder}: ")
    assert "\n" not in str(found.value)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "model", saved_model(tiny_model())
    other.description = {**other.description, "model": tiny_model(width=32).config.to_dict()}
    folder.mkdir()
    for name, content in pack_model(other).items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="of another model"):
        model.load_model(folder)


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = model.load  # type: ignore[attr-defined]
