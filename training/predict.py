"""Predict for new patients: ``seqsetvae-predict MODEL TABLE``, or :func:`predict_patients` from Python."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from model.losses import LossOptions
from model.saved import SavedModel, load_model
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import VOCABULARY_SCHEMA
from pipeline.options import Section, option, parse_explicit_options
from pipeline.prepare.new_patients import prepare_new_patients, write_unlabelled_task
from pipeline.prepare.reference import ReferenceDataSet
from pipeline.prepare.sources.auto import Format
from pipeline.prepare.sources.layout import ColumnOptions, TableOptions
from pipeline.schema import PATIENT_ID, PRIVATE_UMASK, UNKNOWN_CODE, UserError
from pipeline.storage.files import replace_atomically
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder
from training.begin import THREAD_LIMIT
from training.checkpoint import Checkpoint
from training.data import DEFAULT_BATCH_SIZE, DataOptions, agree_on_data
from training.evaluation import Evaluator
from training.export import read_checkpoint
from training.options import RunOptions, TrainOptions
from training.parallel import World, choose_device, choose_threads
from training.predictions import prediction_columns

PROG = "seqsetvae-predict"

MAX_NAMED = 8
"""Most unknown variables that a line names."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Section):
    """Model, input and output."""

    model: Path = option(MISSING, "Folder of train.py --export, or a checkpoint such as best.pt.", metavar="MODEL")
    table: Path = option(MISSING, "File, folder or pattern of event tables of new patients.", metavar="TABLE")
    output: Path | None = option(None, "File of the predictions, .parquet or .csv; by default CSV is printed.")
    data_dir: str | None = option(
        None, "Data set that a checkpoint was trained on; by default the folder that its run read."
    )
    format: Format = option("auto", "Format of TABLE; auto detects it.")
    batch_size: int = option(DEFAULT_BATCH_SIZE, "Number of patients of a batch.", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to compute.")
    threads: int | None = option(None, "Number of threads for operations on the CPU.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None and self.output.suffix not in WRITERS:
            raise UserError(f"--output {self.output}: end its name in {' or '.join(WRITERS)}")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """All options of the command."""

    predict: PredictOptions
    columns: ColumnOptions
    layout: TableOptions


WRITERS: dict[str, Callable[[pa.Table, Any], None]] = {
    ".parquet": partial(pq.write_table, write_page_checksum=True), ".csv": pyarrow.csv.write_csv,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 = done, 2 = something the user can mend.  Only the owner can read the files it makes."""
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)
    try:
        text = "Predict for new patients, who are prepared as preprocess.py --like prepares them."
        tree, explicit = parse_explicit_options(
            CommandLine, arguments, prog=PROG, description=text, positional="model table"
        )
        options = tree.predict
        columns = {name: value for part in (tree.columns, tree.layout) for name, value in vars(part).items()}
        columns = {name: value for name, value in columns.items() if name in explicit}
        world = World(0, 1, choose_device(options.device, 0))
        model = open_model(options.model, options.data_dir).to(world.device)
        torch.set_num_threads(choose_threads(options.threads, world, limit=THREAD_LIMIT[model.description["preset"]]))
        log = partial(print, f"{options.table}:", file=sys.stderr)
        table = predict_patients(
            model, options.table, format=options.format, columns=columns, batch_size=options.batch_size, log=log
        )
        if options.output is None:
            pyarrow.csv.write_csv(table, sys.stdout.buffer)
        else:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(options.output) as new:
                WRITERS[options.output.suffix](table, new)
    except (UserError, OSError, MemoryError) as error:
        print(f"{PROG}: {error or 'out of memory; lower --batch_size'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def open_model(path: Path, data_dir: str | None = None) -> SavedModel:
    """Return the model of a folder, or of a checkpoint and the data set that it was trained on.

    Raises:
        UserError: it cannot be read, or the checkpoint's data set is neither ``data_dir`` nor where its run read it.
    """
    if path.is_dir():
        if data_dir is not None:
            raise UserError(f"--data_dir {data_dir}: not used with a model folder; leave it out")
        return load_model(path)
    saved = Checkpoint.load(path)
    folder = open_folder(data_dir or saved.options["data"]["data_dir"])
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        raise UserError(f"{error}; name the data set that {path} was trained on with --data_dir") from None
    return read_checkpoint(saved, path, folder, manifest)


def predict_patients(
    model: SavedModel, table: Any, *, format: Format = "auto", columns: Mapping[str, Any] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE, log: Callable[[str], object] = lambda _: None,
) -> pa.Table:  # fmt: skip
    """Return what a model predicts for each patient of a table of raw events: a row a patient, sorted by id.

    Its columns are ``patient_id`` and ``probability`` of a positive label; for classes ``prediction`` and
    ``probability_NAME`` of each; for a regression ``prediction``.  Of a model of several tasks they begin with the name
    of the task and ``_``.  A patient of whom no event can be used has no row.

    Args:
        model: see :func:`open_model` and :func:`model.load_model`; it computes on the device where it is.
        table: a path, or a data frame that Arrow can read, with the columns that ``--format table`` recognises.
        format: of the files at a path.
        columns: options of the format, such as ``{"patient_column": "stay"}``.
        batch_size: number of patients of a batch; answers depend on it by rounding alone.
        log: receives lines: how many rows were rejected and why, unknown variables, patients without events.

    Raises:
        UserError: the table cannot be used as a whole, or the model predicts nothing.
    """
    described, outcomes = model.description, model.config.outcomes
    if described["objective"] == "pretrain":
        raise UserError("the model was trained with --objective pretrain and predicts nothing; name another")
    with tempfile.TemporaryDirectory() as work:  # only its owner can read it
        data, samples, task = Path(work) / "data", described["samples"], None
        if not isinstance(table, str | Path):
            pq.write_table(pa.table(table), Path(work) / "events.parquet")
            table, format = Path(work) / "events.parquet", "table"
        summary = prepare_new_patients(Path(table), format, columns or {}, data, _reference_of(model))
        _log_losses(summary, log)
        left_out = [model.vocabulary["variable"][code] for code in samples["excluded_codes"] if code != UNKNOWN_CODE]
        if samples["excluded_codes"]:
            task = ",".join(outcome.name for outcome in outcomes)
            for outcome in outcomes:
                write_unlabelled_task(data, outcome.name, outcome.kind, outcome.classes, left_out)
        cut = {name: samples[name] for name in ("max_sequence_length", "truncate")}
        of_data = DataOptions(data_dir=str(data), batch_size=batch_size, **cut)
        options = TrainOptions(data=of_data, loss=LossOptions(objective="supervised"), run=RunOptions(output_dir=work))
        world = World(0, 1, model.events.embedding.device)
        new = agree_on_data(options.data, Manifest.load(data), world, task, "test")
        tables = Evaluator(options, new, world).validate(model, "test").tables
    joined = {PATIENT_ID: tables[0][PATIENT_ID]}
    for outcome, found in zip(outcomes, tables, strict=True):
        prefix = f"{outcome.name}_" if len(outcomes) > 1 else ""
        names = [*(["prediction"] if outcome.kind == "multiclass" else []), *prediction_columns(outcome)]
        joined |= {prefix + name: found[name] for name in names}
    return pa.table(joined)


def _reference_of(model: SavedModel) -> ReferenceDataSet:
    """Return the data set of the training as far as the model carries it, which is what ``--like`` needs."""
    data, columns = model.description["data"], model.vocabulary
    manifest = Manifest(
        splits={}, files={}, num_codes=model.config.num_codes, options=data["options"], fingerprint=data["fingerprint"],
        vocabulary_fingerprint=model.description["vocabulary_fingerprint"],
        embedding_dim=None,  # embeddings are among the weights
    )  # fmt: skip
    vocabulary = pa.table(columns, schema=VOCABULARY_SCHEMA)
    return ReferenceDataSet(folder=Folder("the data set of the model"), manifest=manifest, vocabulary=vocabulary)


def _log_losses(summary: Mapping[str, Any], log: Callable[[str], object]) -> None:
    """Log what of a table no prediction knows of."""
    if summary["rejects"]:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in summary["rejects"].items())
        log(f"{sum(summary['rejects'].values()):,} of {summary['events_in']:,} rows rejected ({reasons})")
    if summary["unknown_variable_events"]:
        variables = dict.fromkeys(
            name.partition("=")[0] for name in summary["unknown_variables"]
        )  # not texts of values
        names = ", ".join([*variables][:MAX_NAMED])
        log(f"{summary['unknown_variable_events']:,} events of variables that the model does not know: {names}")
    if summary["patients_without_events"]:
        log(f"{summary['patients_without_events']:,} patients without an event that can be used have no prediction")


if __name__ == "__main__":
    sys.exit(main())
