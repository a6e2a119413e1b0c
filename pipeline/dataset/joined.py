"""Several data directories as one: a mixture of places, prepared with the vocabulary of one of them."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.dataset.manifest import Manifest, ShardEntry
from pipeline.dataset.tasks import SampleCounts, Task, has_task
from pipeline.schema import INDEX_FILE, MANIFEST_FILE, TASKS_FOLDER, UserError
from pipeline.storage.folder import File, Folder


class JoinedFolder(Folder):
    """The data directories ``folders`` as one, whose manifest, tasks and tables are made of theirs when they are read.

    A shard of the first is ``1/PATH``, of the second ``2/PATH`` …, and so are their patients called, who are told apart
    where places number them alike.  The vocabulary is that of all, embeddings are those of the first.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        """Read the manifests; UserError where the codes of one mean something else, or one stands twice."""
        super().__init__(", ".join(map(str, folders)))
        self._folders = {f"{number}/": folder for number, folder in enumerate(folders, start=1)}
        self.room = min((folder.room for folder in folders if folder.room is not None), default=None)
        self._manifests = {prefix: Manifest.load(folder) for prefix, folder in self._folders.items()}
        first, *others = self._manifests.values()
        for folder, other in zip(folders[1:], others, strict=True):
            if (
                other.vocabulary_fingerprint != first.vocabulary_fingerprint
                or other.embedding_dim != first.embedding_dim
            ):
                advice = f"prepare it with preprocess.py --like {folders[0]}"
                raise UserError(f"--data_dir {folder}: has another vocabulary than {folders[0]}; {advice}")
        if len({manifest.fingerprint for manifest in self._manifests.values()}) <= len(others):
            raise UserError(
                f"--data_dir {self}: names a data set twice; name each once, and weigh it by --data_weights"
            )
        self._tables = {INDEX_FILE: {prefix: each.file(INDEX_FILE) for prefix, each in self._manifests.items()}}

    def read(self, name: str) -> bytes:
        if name == MANIFEST_FILE:
            return self._join_manifests().encode()
        if name.startswith(f"{TASKS_FOLDER}/"):
            return self._join_tasks(Path(name).stem).encode()
        return self._folders["1/"].read(name)

    @contextmanager
    def local_file(self, file: File, cancelled: threading.Event | None = None) -> Iterator[Path]:
        number, slash, own = file.name.partition("/")
        prefix = f"{number}{slash}" if f"{number}{slash}" in self._folders else "1/"
        own_file = file._replace(name=own) if prefix[:-1] == number else file
        with self._folders[prefix].local_file(own_file, cancelled) as path:
            yield path

    def parts(self, file: File) -> list[tuple[str, Folder, File]]:
        if file.name not in self._tables:
            return super().parts(file)
        own = self._tables[file.name].items()
        return [(prefix, self._folders[prefix], each._replace(verify=file.verify)) for prefix, each in own]

    def _join_manifests(self) -> Manifest:
        first, splits = self._manifests["1/"], dict[str, list[ShardEntry]]()
        for prefix, manifest in self._manifests.items():
            for split, entries in manifest.splits.items():
                splits.setdefault(split, []).extend(replace(entry, path=prefix + entry.path) for entry in entries)
        files = first.files | {INDEX_FILE: _digest(each.sha256 for each in self._tables[INDEX_FILE].values())}
        fingerprint = _digest(manifest.fingerprint for manifest in self._manifests.values())
        return replace(first, splits=splits, tars={}, files=files, pieces={}, fingerprint=fingerprint)

    def _join_tasks(self, name: str) -> Task:
        if not any(has_task(folder, name) for folder in self._folders.values()):
            raise FileNotFoundError(name)
        tasks = {prefix: Task.load(folder, self._manifests[prefix], name) for prefix, folder in self._folders.items()}
        first = tasks["1/"]
        for prefix, task in tasks.items():
            if differs := [what for what in _DEFINITION if getattr(task, what) != getattr(first, what)]:
                other = f"task {name} has other {differs[0]} than that of {self._folders['1/']}"
                raise UserError(f"--data_dir {self._folders[prefix]}: {other}; add it in the same way to both")
        self._tables[first.table().name] = {prefix: task.table() for prefix, task in tasks.items()}
        splits = {split: None for task in tasks.values() for split in task.splits}
        return replace(
            first,
            data=self._join_manifests().fingerprint,
            table_sha256=_digest(task.table_sha256 for task in tasks.values()),
            table_pieces=None,
            splits={s: _add_counts([task.splits.get(s, SampleCounts()) for task in tasks.values()]) for s in splits},
            shards={prefix + path: number for prefix, task in tasks.items() for path, number in task.shards.items()},
            labels_without_patient=sum(task.labels_without_patient for task in tasks.values()),
        )


_DEFINITION = ("kind", "classes", "times", "excluded_codes", "soft_labels")
"""What tasks of one name have in common, for their samples to be one task's."""


def _digest(checksums: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(checksums).encode()).hexdigest()


def _add_counts(parts: Sequence[SampleCounts]) -> SampleCounts:
    """Return the counts of several data sets together; mean and deviation are those of all labels."""
    names = ("num_samples", "num_patients", "num_labelled", "num_without_events")
    sums: Mapping[str, int] = {name: sum(getattr(part, name) for part in parts) for name in names}
    of_classes = [part.class_counts for part in parts if part.class_counts]
    classes = [sum(numbers) for numbers in zip(*of_classes, strict=True)]
    known = [(part.num_labelled, part.mean, part.std or 0.0) for part in parts if part.mean is not None]
    if not known:
        return SampleCounts(**sums, class_counts=classes)
    total = sum(number for number, *_ in known)
    mean = sum(number * own for number, own, _ in known) / total
    square = sum(number * (std**2 + (own - mean) ** 2) for number, own, std in known) / total
    return SampleCounts(**sums, class_counts=classes, mean=mean, std=math.sqrt(square))
