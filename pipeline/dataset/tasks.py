"""Tasks: tables of labels over the shards of a data set, a row a sample.

A task is ``tasks/NAME.parquet`` and ``tasks/NAME.json``, which is written last and removed first: a task is there where
its JSON is.  The JSON seals itself and the table by checksums, and names the data set that both belong to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import TASK_SCHEMA
from pipeline.dataset.tables import read_parquet, report_damage
from pipeline.schema import FORMAT_VERSION, TASKS_FOLDER, UserError
from pipeline.storage.files import seal, sync, unseal, write_atomically
from pipeline.storage.folder import Folder, as_folder

Kind = Literal["binary"]
Times = Literal["date", "minute"]

TASK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCounts:
    """What a split holds of a task.

    Attributes:
        num_samples: all samples, also those without an event up to their prediction time.
        num_patients: patients who have a sample.
    """

    num_samples: int
    num_patients: int
    num_labelled: int
    num_positive: int
    num_without_events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What ``NAME.json`` says of a task.

    Attributes:
        data: fingerprint of the data set over whose shards the task is.
        table_sha256: checksum of ``NAME.parquet``.
        times: what prediction times are; None = there are none, and a sample is a whole patient.
        splits: counts by split.
        shards: number of samples with events, by the path of the shard that holds their patients.
        excluded_codes: codes of the vocabulary whose events no sample has.
        labels_from: name of the file or folder of labels.
        labels_without_patient: samples of the labels whose patient is not in the data set, and which are left out.
    """

    name: str
    kind: Kind
    data: str
    table_sha256: str
    times: Times | None
    splits: dict[str, SampleCounts]
    shards: dict[str, int]
    excluded_codes: list[int]
    labels_from: str
    labels_without_patient: int

    @property
    def table(self) -> str:
        """Return the name of the table below the data directory."""
        return f"{TASKS_FOLDER}/{self.name}.parquet"

    def prevalence(self, split: str = "train") -> float | None:
        """Return the share of positive samples among the labelled ones of a split; None without any."""
        counts = self.splits.get(split)
        return counts.num_positive / counts.num_labelled if counts and counts.num_labelled else None

    def save(self, directory: Path) -> None:
        """Write ``NAME.json``; the table must be complete."""
        content = json.dumps(seal({"format_version": FORMAT_VERSION, **asdict(self)}), indent=1, sort_keys=True)
        write_atomically(directory / _json_name(self.name), (content + "\n").encode())

    @classmethod
    def load(cls, directory: Path | Folder, manifest: Manifest, name: str) -> Task:
        """Return a task of the data set of ``manifest``; UserError where there is none, or it is damaged."""
        folder = as_folder(directory)
        check_task_name(name)
        path, advice = f"{folder}/{_json_name(name)}", "add it again with python -m pipeline.tasks"
        try:
            content = json.loads(folder.read(_json_name(name)))
            plain = unseal(content, path, advice)
            if plain.pop("format_version") != FORMAT_VERSION:
                raise UserError(f"{path}: of another format version than {FORMAT_VERSION}; {advice}")
            task = cls(**plain | {"splits": {key: SampleCounts(**value) for key, value in plain["splits"].items()}})
        except FileNotFoundError:
            add = f"add it with python -m pipeline.tasks add {folder} --name {name} --labels FILE"
            raise UserError(f"{folder}: has no task {name!r}; {add}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except UserError:
            raise
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: cannot be read as a task; {advice}") from None
        if task.data != manifest.fingerprint or task.name != name:
            raise UserError(f"{path}: belongs to another data set; {advice}")
        return task


def check_task_name(name: str) -> None:
    """Raise UserError for a name that cannot be a file's in any store."""
    if not TASK_NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: a task's name has letters, digits and -_. alone; choose another")


def read_task_table(directory: Path | Folder, task: Task, *columns: str) -> pa.Table:
    """Return columns of the table of a task (all of ``TASK_SCHEMA`` by default), checked against its JSON."""
    folder, schema = as_folder(directory), TASK_SCHEMA
    if columns:
        schema = pa.schema([TASK_SCHEMA.field(name) for name in columns])
    with folder.local_file(task.table, task.table_sha256) as path, report_damage(folder, task.table):
        return read_parquet(path, schema)


def has_task(directory: Path | Folder, name: str) -> bool:
    """Return whether a data directory has a task of this name, whole or damaged."""
    try:
        as_folder(directory).read(_json_name(name))
    except FileNotFoundError:
        return False
    return True


def list_tasks(directory: Path) -> list[str]:
    """Return the names of the tasks in a data directory of this machine, in order."""
    paths = (directory / TASKS_FOLDER).glob("*.json")
    return sorted(path.stem for path in paths if TASK_NAME.fullmatch(path.stem))


def find_tasks(directory: Path, manifest: Manifest) -> Iterator[Task]:
    """Yield the whole tasks in ``directory`` that belong to the data set of ``manifest``."""
    for name in list_tasks(directory):
        try:
            yield Task.load(directory, manifest, name)
        except UserError:
            continue


def remove_task(directory: Path, name: str) -> None:
    """Remove a task; UserError where there is none."""
    check_task_name(name)
    path = directory / _json_name(name)
    if not path.exists():
        raise UserError(f"{directory}: has no task {name!r}; it has {', '.join(list_tasks(directory)) or 'none'}")
    path.unlink()
    sync(path.parent)
    path.with_suffix(".parquet").unlink(missing_ok=True)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


def task_files(name: str) -> tuple[str, str]:
    """Return the names of a task's files below the data directory, in the order in which they are written."""
    return f"{TASKS_FOLDER}/{name}.parquet", _json_name(name)


def _json_name(name: str) -> str:
    return f"{TASKS_FOLDER}/{name}.json"


def describe_counts(task: Task) -> dict[str, Any]:
    """Return the sums of all splits, by name."""
    return {
        name: sum(getattr(counts, name) for counts in task.splits.values())
        for name in SampleCounts.__dataclass_fields__
    }
