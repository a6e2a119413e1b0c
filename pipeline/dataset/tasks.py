"""Tasks: tables of labels over the shards of a data set, a row a sample.

A task is ``tasks/NAME.parquet`` and ``tasks/NAME.json``, which is written last and removed first: a task is there where
its JSON is.  The JSON seals itself and the table by checksums, and names the data set that both belong to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import task_schema
from pipeline.dataset.tables import add_prefix, iterate_parquet, read_parquet, report_damage
from pipeline.schema import FORMAT_VERSION, SPLITS, TASKS_FOLDER, Kind, Times, UserError
from pipeline.storage.files import seal, sync, unseal, write_atomically
from pipeline.storage.folder import File, Folder, as_folder
from pipeline.storage.pieces import Pieces

MAX_NAMED_CLASSES: Final = 8
"""Maximum number of classes that a line describes."""

TASK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCounts:
    """What a split holds of a task.

    Attributes:
        num_samples: all samples, also those without an event up to their prediction time.
        num_patients: patients who have a sample.
        class_counts: labelled samples of each class; empty for a regression.
        mean, std: of the labels of a regression; None for classes, and without labels.
    """

    num_samples: int = 0
    num_patients: int = 0
    num_labelled: int = 0
    num_without_events: int = 0
    class_counts: list[int] = field(default_factory=list)
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What ``NAME.json`` says of a task.

    Attributes:
        kind: what labels are: of two classes, of several, or numbers.
        classes: the names of the classes in order, which labels are the numbers of; empty for a regression.
        soft_labels: whether labels of a binary task are probabilities, float32, that a model is trained towards.
        data: fingerprint of the data set over whose shards the task is.
        table_sha256: checksum of ``NAME.parquet``.
        table_pieces: checksums of its pieces; None = it is too small to have several.
        times: what prediction times are; None = there are none, and a sample is a whole patient.
        splits: counts by split.
        shards: number of samples with events, by the path of the shard that holds their patients.
        excluded_codes: codes of the vocabulary whose events no sample has.
        labels_from: name of the file or folder of labels.
        labels_without_patient: samples of the labels whose patient is not in the data set, and which are left out.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    data: str
    table_sha256: str
    times: Times | None
    splits: dict[str, SampleCounts]
    shards: dict[str, int]
    excluded_codes: list[int]
    labels_from: str
    labels_without_patient: int
    soft_labels: bool = False
    table_pieces: Pieces | None = None

    def table(self, *, verify: bool = True) -> File:
        """Return the table as a folder is asked for it."""
        name = f"{TASKS_FOLDER}/{self.name}.parquet"
        return File(name, self.table_sha256, verify=verify, pieces=self.table_pieces)

    def prior(self, split: str = "train") -> tuple[float, ...] | None:
        """Return the share of each class among the labelled samples of a split, or the mean of a regression alone.

        It is what is known of a sample without events.  None = the split has no labels.
        """
        counts = self.splits[split]
        if not counts.num_labelled:
            return None
        if counts.mean is not None:
            return (counts.mean,)
        return tuple(number / counts.num_labelled for number in counts.class_counts)

    def save(self, directory: Path) -> None:
        """Write ``NAME.json``; the table must be complete."""
        write_atomically(directory / _json_name(self.name), self.encode())

    def encode(self) -> bytes:
        content = seal({"format_version": FORMAT_VERSION, **asdict(self)})
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

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
            splits = {split: SampleCounts(**counts) for split, counts in plain["splits"].items()}
            pieces = Pieces.parse(plain["table_pieces"]) if plain.get("table_pieces") else None
            task = cls(**plain | {"splits": splits, "classes": tuple(plain["classes"]), "table_pieces": pieces})
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
    """Return columns of the table of a task (by default all), checked against its JSON."""
    return pa.concat_tables(_read_task(as_folder(directory), task, columns, is_whole=True))


def iterate_task_table(directory: Path | Folder, task: Task, *columns: str) -> Iterator[pa.Table]:
    """Yield some rows of what :func:`read_task_table` returns at a time."""
    return _read_task(as_folder(directory), task, columns, is_whole=False)


def _read_task(folder: Folder, task: Task, columns: Sequence[str], *, is_whole: bool) -> Iterator[pa.Table]:
    schema = task_schema(task.kind, soft=task.soft_labels)
    if columns:
        schema = pa.schema([schema.field(name) for name in columns])
    for prefix, part, file in folder.parts(task.table()):
        with part.local_file(file) as path, report_damage(part, file.name):
            for table in [read_parquet(path, schema)] if is_whole else iterate_parquet(path, schema):
                yield add_prefix(table, prefix)


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


def describe_labels(task: Task, splits: Iterable[str] = SPLITS) -> str:
    """Return what the labels of some splits are, in words: the share of each class, or mean and standard deviation."""
    counts = [task.splits[split] for split in splits if task.splits[split].num_labelled]
    if not counts:
        return "none"
    total = sum(split.num_labelled for split in counts)
    if task.kind == "regression":
        mean = sum(split.num_labelled * (split.mean or 0.0) for split in counts) / total
        square = sum(split.num_labelled * ((split.std or 0.0) ** 2 + (split.mean or 0.0) ** 2) for split in counts)
        return f"mean {mean:.4g}, std {math.sqrt(max(square / total - mean**2, 0.0)):.4g}"
    shares = [sum(split.class_counts[number] for split in counts) / total for number in range(len(task.classes))]
    if task.kind == "binary":
        return f"{shares[1]:.2%} positive"
    named = [f"{name} {share:.1%}" for name, share in zip(task.classes, shares, strict=True)]
    more = len(named) - MAX_NAMED_CLASSES
    return ", ".join(named[:MAX_NAMED_CLASSES]) + (f" and {more:,} classes more" if more > 0 else "")


def load_tasks(directory: Path | Folder, manifest: Manifest, names: str | None) -> tuple[Task, ...]:
    """Return the tasks of these names, between which are commas; none for None, which stands for whole patients.

    Raises:
        UserError: a task is missing or damaged, stands twice, or the tasks cannot share their samples.
    """
    tasks = tuple(Task.load(directory, manifest, name.strip()) for name in names.split(",")) if names else ()
    flag = f"--task {names}"
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError(f"{flag}: names a task twice; name each once")
    if len({tuple(task.excluded_codes) for task in tasks}) > 1:
        raise UserError(f"{flag}: these tasks exclude different codes; add them with the same --exclude_codes")
    if len({task.times for task in tasks if task.times}) > 1:
        raise UserError(f"{flag}: the prediction times of one are dates, of another minutes; give both the same")
    return tasks


def common_times(tasks: tuple[Task, ...]) -> Times | None:
    """Return what the prediction times of tasks are that share their samples; None = no task has any."""
    return next((task.times for task in tasks if task.times), None)
