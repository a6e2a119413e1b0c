"""Tables of predictions: a row a sample, with its label and what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.config import Outcome
from pipeline.arrays import harden
from pipeline.dataset.tasks import Task
from pipeline.loading.batch import PatientBatch
from pipeline.loading.samples import PredictionTime
from pipeline.schema import TIME_COLUMNS, UNLABELLED, Times
from pipeline.storage.files import replace_atomically

Floats = npt.NDArray[np.float64]

TIME_TYPES = {"date": pa.timestamp("us"), "minute": pa.float64()}


def labels_of_batch(batch: PatientBatch, outcomes: Sequence[Outcome]) -> list[Floats]:
    """Return the labels [N] of the samples of a batch for each task, NaN = unlabelled; those of classes are their
    numbers, also where soft.
    """
    label = batch.sample_label.cpu().double().numpy()
    if not batch.sample_label.is_floating_point():
        label = np.where(label == UNLABELLED, np.nan, label)
    labels = [*label.T] if label.ndim > 1 else [label] * len(outcomes)
    return [harden(own) if outcome.kind == "binary" else own for own, outcome in zip(labels, outcomes, strict=True)]


def prediction_columns(outcome: Outcome) -> list[str]:
    """Return the names of the C columns that hold what :meth:`Outcome.predict` gives."""
    if outcome.kind == "multiclass":
        return [f"probability_{name}" for name in outcome.classes]
    return ["prediction" if outcome.kind == "regression" else "probability"]


def make_table(
    outcome: Outcome,
    patient_id: list[str],
    prediction_time: list[PredictionTime] | None,
    label: Floats,
    prediction: npt.NDArray[Any],
    times: Times | None,
) -> pa.Table:
    """Return predictions as a table.

    Its columns are ``patient_id``, ``prediction_time`` where there are ``times``, ``label`` (null = unlabelled), and
    ``probability`` of a positive label; for classes ``prediction``, the likeliest, and ``probability_NAME`` of each;
    for a regression ``prediction``.  What is no number is null.

    Args:
        outcome: what was predicted.
        patient_id: [B].
        prediction_time: [B] times; None = each sample is a whole patient.
        label: [B], NaN = unlabelled.
        prediction: [B, C] as :meth:`Outcome.predict` gives it.
        times: what prediction times are.
    """
    columns: dict[str, Any] = {"patient_id": pa.array(patient_id, pa.string())}
    if times is not None:
        columns["prediction_time"] = pa.array(prediction_time or [None] * len(patient_id), TIME_TYPES[times])
    labels = pa.array(label, pa.float64(), from_pandas=True)
    names = pa.array(outcome.classes, pa.string())
    if outcome.kind == "multiclass":
        columns["label"] = names.take(labels.cast(pa.int64()))
        columns["prediction"] = names.take(pa.array(prediction.argmax(1), mask=np.isnan(prediction).any(1)))
    else:
        columns["label"] = labels.cast(pa.int8()) if outcome.kind == "binary" else labels
    values = prediction[:, 1:] if outcome.kind == "binary" else prediction
    of_outcome = zip(prediction_columns(outcome), values.T, strict=True)
    return pa.table(columns | {name: pa.array(column, pa.float64(), from_pandas=True) for name, column in of_outcome})


def write_predictions(path: Path, table: pa.Table) -> None:
    """Write a table of predictions, whole or not at all."""
    with replace_atomically(path) as new:
        pq.write_table(table, new, write_page_checksum=True)


def labels_of(table: pa.Table, outcome: Outcome) -> Floats:
    """Return the labels [P] of a table of predictions, NaN = unlabelled; those of classes are their numbers."""
    column = table["label"]
    if outcome.kind == "multiclass":
        column = pc.index_in(column, value_set=pa.array(outcome.classes, pa.string()))
    return column.cast(pa.float64()).to_numpy()


def values_of(table: pa.Table, outcome: Outcome) -> Floats:
    """Return the predictions of a table: [P] of a binary outcome or a regression, [P, C] of several classes."""
    columns = [table[name].to_numpy() for name in prediction_columns(outcome)]
    return np.column_stack(columns) if outcome.kind == "multiclass" else columns[0]


def probabilities_of(table: pa.Table, outcome: Outcome) -> Floats:
    """Return the predictions of a table as [P, C]: of classes the probability of each, of a regression one column."""
    values = values_of(table, outcome)
    return np.column_stack([1 - values, values]) if outcome.kind == "binary" else values.reshape(len(values), -1)


def add_empty_samples(table: pa.Table, empty: pa.Table, outcome: Outcome, times: Times | None) -> pa.Table:
    """Return predictions with those of samples before their patient's first event.

    All that is known of these is how frequent each class was in training, or the mean of a regression; where not even
    that is known, the mean of the other predictions.

    Args:
        table: the predictions of the other samples.
        empty: patient, prediction times and label of the samples, as the table of their task has them.
        outcome: what was predicted.
        times: what prediction times are.
    """
    if not empty.num_rows:
        return table
    answer = outcome.prior
    if not answer:
        known = np.atleast_2d(values_of(table, outcome).T).T.mean(0)
        answer = (1 - known[0], known[0]) if outcome.kind == "binary" else tuple(known)
    prediction = np.tile(answer, (empty.num_rows, 1))
    time = None if times is None else empty[TIME_COLUMNS[times]].to_pylist()
    label = empty["label"].cast(pa.float64()).to_numpy()
    label = harden(label) if outcome.kind == "binary" else label
    rows = make_table(outcome, empty["patient_id"].to_pylist(), time, label, prediction, times)
    return pa.concat_tables([table, rows])


def sort_samples(table: pa.Table) -> pa.Table:
    """Return predictions sorted by patient and time."""
    keys = [name for name in ("patient_id", "prediction_time") if name in table.column_names]
    return table.sort_by([(name, "ascending") for name in keys])


def outcome_of(task: Task) -> Outcome:
    """Return what a model of a task predicts."""
    std = task.splits["train"].std
    shape: dict[str, Any] = {"name": task.name, "kind": task.kind, "classes": task.classes}
    return Outcome(**shape, prior=task.prior() or (), std=std if std else 1.0)
