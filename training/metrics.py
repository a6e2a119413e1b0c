"""The lines a run writes of itself, and its throughput."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

if TYPE_CHECKING:
    from pipeline.loading.batch import PatientBatch


Scalar: TypeAlias = str | int | float | bool | None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a :class:`JsonLines` file; a last line that is being written, or that a crash cut, is left out.

    Raises:
        UserError: another line is not a JSON object.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object; move the file away")
        records.append(record)
    return records


class JsonLines:
    """An append-only file of one flat JSON object a line, each flushed as it is written.

    Args:
        path: the file; made where it is missing.
        resume_step: of the checkpoint from which a run goes on: lines of later steps are dropped, for the run
            writes them again.  A last line that a crash cut short is dropped in any case.

    Raises:
        UserError: as :func:`read_json_lines`.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        if path.exists():
            limit = math.inf if resume_step is None else resume_step
            kept = [json.dumps(record) + "\n" for record in read_json_lines(path) if record.get("step", 0) <= limit]
            write_atomically(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Scalar]) -> None:
        """Append ``record``; a number that is not finite becomes null, for JSON has no other word for it."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Wait until all is on the disk, and close."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Throughput:
    """Sums over the batches of an interval, and their rates."""

    num_patients: int = 0
    num_events: int = 0
    num_sets: int = 0
    event_cells: int = 0  # of the padded layout: patients times the longest, padding included
    set_cells: int = 0
    waited: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def of_job(cls, ranks: Sequence[Throughput]) -> Throughput:
        """Those of all ranks as one: counts added up, seconds, which ranks spend side by side, averaged."""
        job = cls(**{field.name: sum(getattr(rank, field.name) for rank in ranks) for field in dataclasses.fields(cls)})
        job.waited, job.step_seconds = job.waited / len(ranks), job.step_seconds / len(ranks)
        return job

    def add(self, batch: PatientBatch, *, waited: float, step_seconds: float, pad_to: int | None = None) -> None:
        """Count one batch.

        Args:
            batch: as the loader gave it, on the host: reading lengths from a GPU would stop it.
            waited: seconds that the step waited for the batch.
            step_seconds: seconds that it then took.
            pad_to: event cells of a padded row; by default the most events of a patient of the batch.
        """
        events, sets = batch.events_per_patient.numpy(), batch.sets_per_patient.numpy()
        self.num_patients += batch.num_patients
        self.num_events += batch.num_events
        self.num_sets += batch.num_sets
        self.event_cells += batch.num_patients * (int(events.max(initial=0)) if pad_to is None else pad_to)
        self.set_cells += batch.num_patients * int(sets.max(initial=0))
        self.waited += waited
        self.step_seconds += step_seconds

    def rates(self) -> dict[str, float]:
        """Per second of wall time, waiting included, and fractions; 0 where nothing was."""
        seconds = self.waited + self.step_seconds
        return {
            "patients_per_second": _ratio(self.num_patients, seconds),
            "events_per_second": _ratio(self.num_events, seconds),
            "data_wait_fraction": _ratio(self.waited, seconds),
            "event_padding_waste": _ratio(self.event_cells - self.num_events, self.event_cells),
            "set_padding_waste": _ratio(self.set_cells - self.num_sets, self.set_cells),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
