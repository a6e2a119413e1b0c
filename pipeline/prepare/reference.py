"""Prepare new patients with the vocabulary, statistics and rules of an existing data set."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import open_checked, read_vocabulary
from pipeline.options import Section, option
from pipeline.prepare.rules import Limits, Rules
from pipeline.prepare.sources.source import Source
from pipeline.prepare.splits import SplitName
from pipeline.schema import EMBEDDINGS_FILE, UserError
from pipeline.storage.files import sync
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder

WHY: Final = "e.g. to evaluate a trained model on new patients"


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(Section):
    """A data set that new patients are compared with."""

    like: str | None = option(None, f"Use vocabulary, statistics and rules of a data directory (path or URL), {WHY}.")
    like_split: SplitName = option("test", "Split of all patients, with --like.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceDataSet:
    """A whole data directory whose vocabulary, statistics and rules are used."""

    folder: Folder
    manifest: Manifest
    vocabulary: pa.Table

    @classmethod
    def open(cls, directory: str) -> Self:
        """Open the data set in ``directory``, a path or a URL; raise UserError where it is missing or damaged."""
        folder = open_folder(directory)
        manifest = Manifest.load(folder)
        if manifest.embedding_dim is not None:
            with open_checked(folder, manifest, EMBEDDINGS_FILE):  # before the long work: it may be damaged
                pass
        return cls(folder=folder, manifest=manifest, vocabulary=read_vocabulary(folder, manifest))

    @property
    def limits(self) -> Limits:
        """Return the outlier limits (low, high) of each variable that has some, in raw units."""
        columns = (self.vocabulary[name].to_pylist() for name in ("variable", "low", "high"))
        return {variable: (low, high) for variable, low, high in zip(*columns, strict=True) if low is not None}

    def rules(self, explicit: Mapping[str, Any]) -> Rules:
        """Return the rules of the data set; raise UserError where those that were set explicitly are others."""
        self._refuse_others(Rules(**explicit).options, explicit)
        return Rules.from_options(self.manifest.options)

    def adapt_source(self, source: Source, explicit: Mapping[str, Any]) -> Source:
        """Return the source with the data set's definition of an event, if it is of the same format.

        Options that were set explicitly and define it otherwise are a UserError.
        """
        if source.name != self.manifest.options["format"]:
            return source
        names = source.event_options
        self._refuse_others({name: source.options[name] for name in names}, explicit)
        return replace(source, **{name: _to_tuple(self.manifest.options[name]) for name in names})

    def _refuse_others(self, options: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
        for name in options.keys() & explicit.keys():
            saved, wanted = self.manifest.options[name], options[name]
            if wanted != _to_tuple(saved):
                raise UserError(f"--{name}: {self.folder} was prepared with {saved!r}; leave it out, --like gives it")

    def copy_embeddings(self, target: Path) -> int | None:
        """Copy the embeddings, if the data set has some, to the file ``target``, and return their width."""
        if self.manifest.embedding_dim is not None:
            with open_checked(self.folder, self.manifest, EMBEDDINGS_FILE) as embeddings:
                shutil.copyfile(embeddings, target)
            sync(target)
        return self.manifest.embedding_dim


def _to_tuple(value: Any) -> Any:
    """Return the value of an option as it was before JSON made a list of a tuple."""
    return tuple(value) if isinstance(value, list) else value
