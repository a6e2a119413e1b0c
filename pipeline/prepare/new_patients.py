"""Prepare patients whom a trained model has never seen, with what it carries of its data set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import list_tasks, remove_task
from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.reference import ReferenceDataSet
from pipeline.prepare.sources.auto import open_source
from pipeline.prepare.sources.labels import Labels
from pipeline.prepare.splits import SplitRule
from pipeline.prepare.tasks import write_task
from pipeline.schema import LABEL, PATIENT_ID, Kind


def prepare_new_patients(
    path: Path, format_name: str, columns: Mapping[str, Any], output: Path, reference: ReferenceDataSet
) -> dict[str, Any]:  # fmt: skip
    """Prepare a table into the data directory ``output`` as ``preprocess.py --like`` does; return the summary.

    Args:
        path: file, folder or pattern of event tables.
        format_name: a value of ``--format``.
        columns: options of the format that are set, such as ``patient_column``.
        output: a new folder; all patients are in its split ``test``, and it has no task.
        reference: what the model carries of its data set.
    """
    source = reference.adapt_source(open_source(path, format_name, columns), columns)
    options = BuildOptions(split_rule=SplitRule.all_in("test"), rules=reference.rules({}), reference=reference)
    summary = build(source, output, options)
    for name in list_tasks(output):  # of labels that lie beside the input
        remove_task(output, name)
    return summary


def write_unlabelled_task(
    directory: Path, name: str, kind: Kind, classes: tuple[str, ...], left_out: Sequence[str]
) -> None:
    """Write a task whose samples are whole patients without labels and without events of the variables ``left_out``."""
    nobody = pl.DataFrame(schema={PATIENT_ID: pl.String, LABEL: pl.Float64})
    labels = Labels.of_frame("new patients", nobody, kind, classes)
    expressions = tuple(f"^{re.escape(variable)}$" for variable in left_out)
    write_task(directory, Manifest.load(directory), name, labels, expressions)
