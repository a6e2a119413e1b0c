"""Checkpoints: whole or absent, finite, and data only, never code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from model.average import AveragedModel, TrainedModel
from model.config import SeqSetVAEConfig
from model.seqsetvae import SeqSetVAE
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

CHECKPOINT_VERSION = 6

SHAPELESS = ("dropout",)
"""Fields of the model's configuration that decide no weight's shape or meaning."""


def load_model(path: str | Path, vocabulary_fingerprint: str) -> TrainedModel:
    """Return the trained model of a checkpoint, on the CPU, ready to predict.

    Args:
        path: such as ``run/checkpoints/best.pt``.
        vocabulary_fingerprint: of the data it is for, ``loader.manifest.vocabulary_fingerprint``.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the data's codes mean something else.
    """
    return Checkpoint.load(Path(path)).build_model(Path(path), vocabulary_fingerprint).eval()


# What reading a stranger's archive can raise: of the system, of the archive, of the restricted unpickler.
_UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had not stopped, or a reader to predict.

    Attributes:
        vocabulary_fingerprint: of the data it was trained on; codes mean nothing under another.
        options: of the run, by section and field, as ``config.yaml`` has them.
        state: as :meth:`training.state.TrainState.state_dict` gives it; of an average the weights of its ``members`` in
            place of the states of one model.
        metrics: of the validation that chose this checkpoint, with its ``epoch`` and ``step``; None in ``last.pt``.
    """

    config: dict[str, Any]
    vocabulary_fingerprint: str
    options: dict[str, Any]
    state: dict[str, Any]
    metrics: dict[str, Any] | None = None
    version: int = CHECKPOINT_VERSION

    @property
    def step(self) -> int:
        """Optimiser steps that it was saved after."""
        return int(self.state["progress"]["step"])

    def save(self, path: Path) -> None:
        """Write to ``path``, which is the old checkpoint or this one at every moment."""
        buffer = io.BytesIO()
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, buffer)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint onto the CPU; nothing in it can run code.  What is not one of ours is a UserError."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the archive's checksums
                damaged = archive.testzip()
            content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except _UNREADABLE as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a readable checkpoint ({first_line})") from None
        if damaged:
            raise UserError(f"{path}: not a readable checkpoint (checksum of {damaged} is wrong)")
        content = content if isinstance(content, dict) else {}
        version = content.get("version", CHECKPOINT_VERSION)
        if version != CHECKPOINT_VERSION:
            raise UserError(f"{path}: checkpoint version {version}, this program reads {CHECKPOINT_VERSION}")
        if content.keys() != {field.name for field in fields(cls)}:
            raise UserError(f"{path}: not a checkpoint of train.py")
        return cls(**content)

    def build_model(self, path: Path, vocabulary_fingerprint: str, *, recalibrated: bool = True) -> TrainedModel:
        """Return the trained model, on the CPU; ``path`` is for the message if vocabulary or weights are other ones.

        Without ``recalibrated`` its probabilities are what they were before cross-fitting recalibrated them.
        """
        models = self.build_members(path, vocabulary_fingerprint, recalibrated=recalibrated)
        return models[0] if len(models) == 1 else AveragedModel(models)

    def build_members(self, path: Path, vocabulary_fingerprint: str, *, recalibrated: bool = True) -> list[SeqSetVAE]:
        """Return the trained models that :meth:`build_model` averages; mostly one."""
        self.check_same_vocabulary(path, vocabulary_fingerprint)
        models = []
        try:
            config = SeqSetVAEConfig.from_dict(self.config)
            if not recalibrated:
                plain = (replace(outcome, calibration=(), conformal=()) for outcome in config.outcomes)
                config = replace(config, outcomes=tuple(plain))
            for weights in self.state["members"] if "members" in self.state else [self.state["ema_model"]]:
                models.append(SeqSetVAE(config))
                models[-1].load_state_dict(weights)
        except (TypeError, RuntimeError, AttributeError, KeyError) as error:
            raise UserError(f"{path}: checkpoint of another model ({str(error).splitlines()[0]})") from None
        return models

    def check_same_vocabulary(self, path: Path, vocabulary_fingerprint: str) -> None:
        """Raise UserError unless the data's codes mean what they meant in training."""
        if self.vocabulary_fingerprint != vocabulary_fingerprint:
            advice = "use the data set of its training, or prepare new patients with preprocess.py --like that data set"
            raise UserError(f"{path}: trained with another vocabulary than this data has; {advice}")

    def check_same_model(self, path: Path, config: SeqSetVAEConfig, *, but: Collection[str] = ()) -> None:
        """Raise UserError, naming the first difference, unless the checkpoint is of a model of this shape.

        Fields named in ``but`` may differ.
        """
        asked = asdict(config)
        for name in sorted((asked.keys() | self.config.keys()) - {*SHAPELESS, *but}):
            there, here = self.config.get(name), asked.get(name)
            if there != here:
                raise UserError(f"{path}: checkpoint of another model: {name} is {there} there, {here} here")
