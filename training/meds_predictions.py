"""Predictions in the schema of MEDS, as ``meds-evaluation`` and MEDS-DEV read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.arrays import is_labelled
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task
from pipeline.schema import UserError
from pipeline.storage.files import replace_atomically

FOLDER = "predictions_meds"
NO_THRESHOLD = 0.5
"""Threshold where the validation split cannot choose one: it lacks one of the classes."""

SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("prediction_time", pa.timestamp("us"), nullable=False),
        pa.field("boolean_value", pa.bool_(), nullable=False),
        pa.field("predicted_boolean_value", pa.bool_(), nullable=False),
        pa.field("predicted_boolean_probability", pa.float64(), nullable=False),
    ]
)


def check_meds_task(manifest: Manifest, tasks: tuple[Task, ...]) -> None:
    """Raise UserError where predictions cannot be written as MEDS has them, which is for one binary task."""
    problem = None
    if len(tasks) > 1 or (tasks and tasks[0].kind != "binary"):
        problem = "MEDS has a schema for one binary task; choose one with --task"
    elif not tasks or tasks[0].times != "date":
        problem = "the task has no prediction times that are dates; choose one of MEDS labels with --task"
    elif manifest.options.get("pseudonym_key"):
        problem = "patients are called by pseudonyms, MEDS needs their subject_id; prepare without --pseudonymize"
    if problem:
        raise UserError(f"--meds_predictions: {problem}")


def choose_threshold(label: npt.NDArray[Any], probability: npt.NDArray[np.float64]) -> float:
    """Return the least probability that counts as positive where F1 is best; labels are 0 and 1, -1 or NaN = none."""
    labelled = is_labelled(label)
    label, probability = label[labelled], probability[labelled]
    if len(np.unique(label)) < 2:
        return NO_THRESHOLD
    from sklearn.metrics import precision_recall_curve  # noqa: PLC0415 (a second that only these predictions need)

    precision, recall, thresholds = precision_recall_curve(label, probability)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return float(thresholds[np.argmax(f1[:-1])])


def write_meds_predictions(directory: Path, split: str, predictions: pa.Table, threshold: float) -> Path:
    """Write the labelled of ``predictions`` to ``predictions_meds/<split>.parquet``, with a folder of its own.

    Raises:
        UserError: an id is no whole number of 64 bits.
    """
    labelled = predictions.filter(predictions["label"].is_valid())
    try:
        subject = labelled["patient_id"].cast(pa.int64())
    except pa.ArrowInvalid:
        found = "an id of a patient is no whole number, as a subject_id is"
        raise UserError(f"--meds_predictions: {found}; leave the flag out") from None
    probability = labelled["probability"].to_numpy()
    columns = [
        subject,
        labelled["prediction_time"],
        labelled["label"].cast(pa.bool_()),
        pa.array(probability >= threshold),
        labelled["probability"],
    ]
    path = directory / FOLDER / f"{split}.parquet"
    path.parent.mkdir(exist_ok=True)
    with replace_atomically(path) as temporary:
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary)
    return path
