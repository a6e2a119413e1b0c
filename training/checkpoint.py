"""Checkpoints: complete or absent, and data only, never code."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from model.config import SeqSetVAEConfig
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

CHECKPOINT_VERSION = 1


def load_model(path: str | Path, vocabulary_fingerprint: str) -> SeqSetVAE:
    """The trained model of a checkpoint, on the CPU, ready to predict.

    Args:
        path: such as ``run/checkpoints/best.pt``.
        vocabulary_fingerprint: of the data it is for, ``loader.manifest.vocabulary_fingerprint``.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the data's codes mean something else.
    """
    return Checkpoint.load(Path(path)).build_model(Path(path), vocabulary_fingerprint).eval()


# What reading a stranger's archive can raise: of the system, of the archive, of the restricted unpickler.
_UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything a run needs to go on as if it had not stopped, or a reader to predict.

    Attributes:
        config: :class:`SeqSetVAEConfig` as a dictionary.
        vocabulary_fingerprint: of the data it was trained on; codes mean nothing under another.
        model, averaged: weights, and their running mean, which is what predicts.
        optimizer, scaler: their states.
        loader: place in the data, of the next batch.
        progress: the trainer's own counters.
        version: of this layout.
    """

    config: dict[str, Any]
    vocabulary_fingerprint: str
    model: dict[str, Any]
    averaged: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    loader: dict[str, Any]
    progress: dict[str, Any]
    version: int = CHECKPOINT_VERSION

    def save(self, *paths: Path) -> None:
        """Write each path so that it is the old checkpoint or this one at every moment."""
        buffer = io.BytesIO()
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, buffer)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint onto the CPU; nothing in the file can run code.

        Raises:
            UserError: the file is missing, damaged, or not one of ours.
        """
        try:
            with zipfile.ZipFile(
                path
            ) as archive:  # what torch.save writes; its checksums are not looked at by torch.load
                damaged = archive.testzip()
            content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except _UNREADABLE as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a readable checkpoint ({first_line})") from None
        if damaged:
            raise UserError(f"{path}: not a readable checkpoint (checksum of {damaged} is wrong)")
        if not isinstance(content, dict) or set(content) != {field.name for field in fields(cls)}:
            raise UserError(f"{path}: not a checkpoint of train.py")
        if content["version"] != CHECKPOINT_VERSION:
            raise UserError(f"{path}: checkpoint version {content['version']}, this program reads {CHECKPOINT_VERSION}")
        return cls(**content)

    def build_model(self, path: Path, vocabulary_fingerprint: str) -> SeqSetVAE:
        """The trained model, on the CPU.

        Raises:
            UserError: the data has another vocabulary, or the weights are another model's; ``path`` is for the message.
        """
        self.check_same_vocabulary(path, vocabulary_fingerprint)
        try:
            model = SeqSetVAE(SeqSetVAEConfig(**self.config))
            model.load_state_dict(self.averaged)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path}: checkpoint of another model ({str(error).splitlines()[0]})") from None
        return model

    def check_same_vocabulary(self, path: Path, vocabulary_fingerprint: str) -> None:
        """Raise UserError unless the data's codes mean what they meant in training."""
        if self.vocabulary_fingerprint != vocabulary_fingerprint:
            raise UserError(
                f"{path}: trained with another vocabulary than this data has; use the data set it was trained on, "
                "or prepare new patients with preprocess.py --like that data set"
            )

    def check_same_model(self, path: Path, config: SeqSetVAEConfig) -> None:
        """Raise UserError, naming the first difference, unless the checkpoint is of a model of this shape."""
        asked = asdict(config)
        for name in sorted(set(asked) | set(self.config)):
            if asked.get(name) != self.config.get(name):
                there, here = self.config.get(name), asked.get(name)
                raise UserError(f"{path}: checkpoint of another model: {name} is {there} there, {here} here")
