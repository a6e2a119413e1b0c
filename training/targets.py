"""What a model is trained towards: labels, and beside them what a teacher says."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.loading.batch import PatientBatch
from pipeline.loading.samples import sample_keys
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

TEACHER_FILE = "teacher.json"


@dataclass(frozen=True, slots=True)
class Teacher:
    """The probability of a positive label of each labelled training sample, by its key, and its ``weight`` among what
    the model is trained towards.
    """

    weight: float
    probability: dict[str, float]

    def soften(self, batch: PatientBatch) -> PatientBatch:
        """Return a batch whose labels are between those it has and what the teacher says."""
        keys = sample_keys(*batch.sample_names)
        label = batch.sample_label.double()
        if not batch.sample_label.is_floating_point():
            label[label < 0] = torch.nan
        taught = torch.tensor([self.probability.get(key, torch.nan) for key in keys], dtype=torch.float64)
        label = torch.lerp(label, taught, self.weight).float()
        if batch.samples is None:
            return dataclasses.replace(batch, label=label)
        return dataclasses.replace(batch, samples=dataclasses.replace(batch.samples, label=label))

    def save(self, path: Path) -> None:
        """Write to ``path``, a JSON file."""
        write_atomically(path, (json.dumps(dataclasses.asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Teacher:
        """Read what :meth:`save` wrote; raise UserError where the file is missing, or not one of these."""
        try:
            saved = json.loads(path.read_bytes())
            probability = {str(key): float(value) for key, value in saved["probability"].items()}
            return cls(weight=float(saved["weight"]), probability=probability)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            lost = "without it what the run learned towards is not known: start a new --output_dir"
            raise UserError(f"{path}: cannot be read ({error}); {lost}") from error
