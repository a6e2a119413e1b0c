"""A model folder: the weights of a trained model as safetensors, and a JSON file of all else that predicting needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.average import AveragedModel
from model.config import SeqSetVAEConfig
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError

MODEL_VERSION: Final = 1
"""Of the content of a model folder; a reader refuses any other."""

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"

UNREADABLE: Final = (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError, RecursionError)
"""What reading a file that is none of ours can raise."""

ADVICE: Final = "export the checkpoint again with train.py --export"


class SavedModel(AveragedModel):
    """A trained model that predicts, with what it was trained on.

    Attributes:
        description: the content of ``config.json``; docs/export.md has its fields.
    """

    def __init__(self, members: Sequence[SeqSetVAE], description: Mapping[str, Any]) -> None:
        super().__init__(members)
        self.description = description
        self.eval()

    @property
    def vocabulary(self) -> dict[str, list[Any]]:
        """The columns of ``vocabulary.parquet``: code, variable, count, mean, std, low, high, description."""
        return dict(self.description["vocabulary"])


def pack_model(model: SavedModel) -> dict[str, bytes]:
    """Return the files of a model folder by their names; a checksum over both is among the weights."""
    config = (json.dumps(model.description, indent=1, ensure_ascii=False) + "\n").encode()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "sha256": _digest(config, tensors)}
    return {WEIGHTS_FILE: safetensors.torch.save(tensors, metadata), CONFIG_FILE: config}


def _digest(config: bytes, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over the bytes of ``config.json`` and the names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256(config)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_model(directory: str | Path) -> SavedModel:
    """Return the model of a folder that ``train.py --export`` wrote, on the CPU, in evaluation mode.

    It is called with a batch of codes and values of its own vocabulary, ``model(batch).probability`` or
    ``.predictions``, and answers what the checkpoint that was exported does, bit for bit.

    Raises:
        UserError: there is no such folder, it is damaged or was changed, or another version wrote it.
    """
    folder = Path(directory)
    try:
        config = (folder / CONFIG_FILE).read_bytes()
        description = json.loads(config)
        version = description["version"]
        if version == MODEL_VERSION:
            with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
                expected = (file.metadata() or {}).get("sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except FileNotFoundError:
        missing = next(name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).exists())
        raise UserError(f"{folder}: no model folder, {missing} is missing; {ADVICE}") from None
    except UNREADABLE as error:
        raise UserError(f"{folder}: cannot be read as a model folder ({_first_line(error)}); {ADVICE}") from None
    if version != MODEL_VERSION:
        raise UserError(f"{folder}: model folder of version {version}, this program reads {MODEL_VERSION}; {ADVICE}")
    if _digest(config, tensors) != expected:
        raise UserError(f"{folder}: {CONFIG_FILE} or {WEIGHTS_FILE} is not as it was written; copy both, or {ADVICE}")
    try:
        shape = SeqSetVAEConfig.from_dict(description["model"])
        model = SavedModel([SeqSetVAE(shape) for _ in range(description["members"])], description)
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise UserError(f"{folder}: of another model ({_first_line(error)}); {ADVICE}") from None
    return model
