"""Experiment trackers: what a run logs goes to TensorBoard, Weights & Biases or MLflow as well (``--track``).

``metrics.jsonl`` stays the truth; a tracker is shown its lines.  Nothing leaves the machine unless the tracker's own
environment variables (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``) say so.  Another tracker is a subclass of
:class:`Tracker` and a line in ``TRACKERS``.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.reports.page import is_finite
from pipeline.schema import UserError
from pipeline.storage.files import write_atomically

PROJECT = "seqsetvae"


class Tracker:
    """A run in a tracker; it is the run of before where the same ``identity`` begins again.

    Args:
        directory: of the run.
        identity: what names the run for good, 32 hexadecimal digits.
        config: options of the run by ``section.name``.
        step: the step from which the run begins or goes on.
    """

    package = ""

    def __init__(self, directory: Path, identity: str, config: Mapping[str, Any], step: int) -> None:
        raise NotImplementedError

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show finite numbers of a step, by names such as ``train/loss``."""
        raise NotImplementedError

    def add_report(self, path: Path) -> None:
        """Keep a page as an artifact, where the tracker has such."""

    def close(self, *, finished: bool) -> None:
        """Write what is left; the run has ``finished``, or may go on later."""


class TensorBoard(Tracker):
    """Event files below ``RUN/tensorboard``; steps that a resumed run makes again replace those of before."""

    package = "tensorboard"

    def __init__(self, directory: Path, identity: str, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (seconds, for whoever wants it)

        self.writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        self.writer.add_text("options", "\n".join(f"    {name}: {value}" for name, value in config.items()), step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def add_report(self, path: Path) -> None:
        self.writer.add_text("report", str(path))

    def close(self, *, finished: bool) -> None:
        self.writer.close()


class WandB(Tracker):
    """A run of Weights & Biases, offline unless ``WANDB_MODE`` says otherwise; ``wandb sync`` sends it later."""

    package = "wandb"

    def __init__(self, directory: Path, identity: str, config: Mapping[str, Any], step: int) -> None:
        self.wandb: Any = import_module("wandb")
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.resolve().name,
            id=identity,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(directory),
            config=dict(config),
            settings=self.wandb.Settings(console="off", silent=True),
        )
        self.run.define_metric("*", step_metric="step")  # a resumed run may make steps again, and W&B's own only rises

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def add_report(self, path: Path) -> None:
        artifact = self.wandb.Artifact(f"report-{self.run.id}", type="report")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
    """A run of MLflow, in ``RUN/mlflow.db`` unless ``MLFLOW_TRACKING_URI`` names a server."""

    package = "mlflow"

    def __init__(self, directory: Path, identity: str, config: Mapping[str, Any], step: int) -> None:
        tracking, entities = import_module("mlflow.tracking"), import_module("mlflow.entities")
        self.metric, self.directory = entities.Metric, directory.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.client: Any = tracking.MlflowClient(uri or f"sqlite:///{self.directory}/mlflow.db")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        place = None if uri else (self.directory / "mlflow_artifacts").as_uri()
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name, place)
        found = self.client.search_runs([number], filter_string=f"tags.seqsetvae_run = '{identity}'")
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {"seqsetvae_run": identity}
        self.run = self.client.create_run(number, run_name=self.directory.name, tags=tags).info.run_id
        params = [entities.Param(name, str(value)) for name, value in config.items()]
        self.client.log_batch(self.run, params=params)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [self.metric(name, number, now, step) for name, number in numbers.items()])

    def add_report(self, path: Path) -> None:
        self.client.log_artifact(self.run, str(path))

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError where ``--track`` names no tracker, or one whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: not a tracker; choose of {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name].package) is None:
            raise UserError(f"--track {name}: its package is not installed; pip install 'seqsetvae[{name}]'")


def open_trackers(
    names: Sequence[str], directory: Path, options: Mapping[str, Mapping[str, Any]], step: int
) -> list[Tracker]:
    """Return the trackers of a run that begins or goes on at a step; its identity is kept in ``RUN/run_id``."""
    path = directory / "run_id"
    if names and not path.exists():
        write_atomically(path, f"{uuid.uuid4().hex}\n".encode())
    config = _flatten(options)
    return [TRACKERS[name](directory, path.read_text().strip(), config, step) for name in dict.fromkeys(names)]


def show_line(trackers: Sequence[Tracker], kind: str, numbers: Mapping[str, Any]) -> None:
    """Show a line of metrics.jsonl to all trackers."""
    if trackers:
        finite = {
            f"{kind}/{name}": float(x) for name, x in _flatten(numbers).items() if name != "step" and is_finite(x)
        }
        for tracker in trackers:
            tracker.log(numbers["step"], finite)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested objects by their names with dots between."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
