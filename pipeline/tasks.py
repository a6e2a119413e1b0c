"""``python -m pipeline.tasks add|list|remove DIR``: the tasks of a data directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tasks import Task, describe_labels, list_tasks, remove_task
from pipeline.options import Section, option, parse_options
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.sources.label_files import LabelColumns, LabelKind
from pipeline.prepare.sources.labels import LABEL_CLASSES_HELP, LABEL_KIND_HELP, read_labels
from pipeline.prepare.tasks import default_exclusions, read_patient_names, write_task
from pipeline.prepare.warn import warn_of_splits, warn_of_strangers
from pipeline.schema import UserError

PROG: Final = "python -m pipeline.tasks"
USAGE: Final = f"{PROG} add|list|remove DIR [--OPTION VALUE …]"


@dataclass(frozen=True, kw_only=True)
class DirectoryOptions(Section):
    """The data directory."""

    data_dir: Path = option(MISSING, "Data directory that preprocess.py made.", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class NameOptions(DirectoryOptions):
    """The task."""

    name: str = option(MISSING, "Name of the task: letters, digits and -_. alone.")


@dataclass(frozen=True, kw_only=True)
class AddOptions(NameOptions):
    """The task and its labels."""

    labels: Path = option(MISSING, "CSV or Parquet file of labels, or a folder of them such as MEDS label files.")
    label_column: str | None = option(None, "Column of the label; else one of the usual names.")
    label_kind: LabelKind = option("auto", LABEL_KIND_HELP)
    label_classes: tuple[str, ...] = option((), LABEL_CLASSES_HELP)
    patient_column: str | None = option(None, "Column of the patient; else one of the usual names.")
    time_column: str | None = option(None, "Column of the prediction time, as a date or as minutes of the patient.")
    exclude_codes: tuple[str, ...] = option(
        (), "Regular expressions of variables whose events no sample has, or none. Default: for MEDS labels without "
        "prediction times, codes of death and discharge.",
    )  # fmt: skip
    pseudonymize: Path | None = option(None, "File of the key with which the data set's patients were hashed.")


@dataclass(frozen=True, kw_only=True)
class AddCommand:
    """The options of ``add``."""

    task: AddOptions


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """The options of ``list``."""

    data: DirectoryOptions


@dataclass(frozen=True, kw_only=True)
class RemoveCommand:
    """The options of ``remove``."""

    task: NameOptions


def add(arguments: Sequence[str]) -> None:
    """Add a task to a data directory, and print what it holds."""
    description = "Add a task to a data directory: a table of labels over shards that stay as they are."
    options = parse_options(AddCommand, arguments, prog=f"{PROG} add", description=description, positional="data_dir")
    given, directory = options.task, options.task.data_dir
    manifest = Manifest.load(directory)
    key = manifest.options.get("pseudonym_key")
    pseudonyms = Pseudonyms.read(given.pseudonymize) if given.pseudonymize else None
    if key != (pseudonyms and pseudonyms.fingerprint):
        how = "give its key with --pseudonymize" if key else "leave --pseudonymize out"
        raise UserError(f"{directory}: was prepared {'with a' if key else 'without a'} key for patients' ids; {how}")
    columns = LabelColumns(
        label=given.label_column,
        patient=given.patient_column,
        time=given.time_column,
        kind=given.label_kind,
        classes=given.label_classes,
    )
    labels = read_labels(given.labels, columns, pseudonyms.hide_names if pseudonyms else None)
    exclude_codes = given.exclude_codes or default_exclusions(manifest.options.get("format", ""), labels)
    if exclude_codes == ("none",):
        exclude_codes = ()
    task = write_task(directory, manifest, given.name, labels, exclude_codes)
    _print_tasks([task])
    strangers = warn_of_strangers(task, labels, None if pseudonyms else read_patient_names(directory, manifest))
    for warning in (*labels.warnings, *warn_of_splits(task.splits), *strangers):
        print(f"warning: {warning}", file=sys.stderr)


def list_(arguments: Sequence[str]) -> None:
    """Print the tasks of a data directory; one that is damaged is a UserError."""
    options = parse_options(
        ListCommand, arguments, prog=f"{PROG} list", description="List tasks.", positional="data_dir"
    )
    directory = options.data.data_dir
    manifest = Manifest.load(directory)
    _print_tasks([Task.load(directory, manifest, name) for name in list_tasks(directory)])


def remove(arguments: Sequence[str]) -> None:
    """Remove a task from a data directory."""
    options = parse_options(
        RemoveCommand, arguments, prog=f"{PROG} remove", description="Remove a task.", positional="data_dir"
    )
    remove_task(options.task.data_dir, options.task.name)


def _print_tasks(tasks: Sequence[Task]) -> None:
    names = ("num_samples", "num_patients", "num_labelled", "num_without_events")
    table = Table("task", "kind", "samples", "patients", "labelled", "without events", "labels", "prediction times")
    for task in tasks:
        counts = (sum(getattr(split, name) for split in task.splits.values()) for name in names)
        labels = describe_labels(task)
        table.add_row(task.name, task.kind, *(f"{number:,}" for number in counts), labels, task.times or "none")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


COMMANDS: Final = {"add": add, "list": list_, "remove": remove}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when done, 2 for something that the user can mend."""
    name, *given = list(sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if name in ("-h", "--help"):
            print(f"usage: {USAGE}\n\nEach command has a --help of its own.")
            return 0
        if name not in COMMANDS:
            raise UserError(f"{name or 'nothing'!r}: no command; usage: {USAGE}")
        COMMANDS[name](given)
    except (UserError, OSError) as error:
        print(f"pipeline.tasks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
