"""An existing data set as the measure of new patients: its vocabulary, statistics and rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import pyarrow as pa

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tables import open_checked, read_vocabulary
from pipeline.prepare.rules import Rules
from pipeline.prepare.sources.source import Source
from pipeline.prepare.splits import SplitRule
from pipeline.schema import EMBEDDINGS_FILE, SPLITS, UserError
from pipeline.storage.folder import Folder
from pipeline.storage.remote import open_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Like:
    """A data directory, whole and unchanged, whose patients new ones are to be compared with."""

    folder: Folder
    manifest: Manifest
    vocabulary: pa.Table

    @classmethod
    def open(cls, directory: str) -> Self:
        """The data set in ``directory``, a path or a URL.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder = open_folder(directory)
        manifest = Manifest.load(folder)
        if manifest.embedding_dim is not None:
            with open_checked(folder, manifest, EMBEDDINGS_FILE):  # before the long work: it may be damaged
                pass
        return cls(folder=folder, manifest=manifest, vocabulary=read_vocabulary(folder, manifest))

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Of outliers, by variable."""
        columns = (self.vocabulary[name].to_pylist() for name in ("variable", "low", "high"))
        return {variable: (low, high) for variable, low, high in zip(*columns, strict=True) if low is not None}

    def rules(self, given: Mapping[str, Any]) -> Rules:
        """The data set's.

        Raises:
            UserError: those ``given``, by their fields' names, are others.
        """
        self._refuse_others(Rules(**given).options, given)
        return Rules.from_options(self.manifest.options)

    def source(self, source: Source, given: Mapping[str, Any]) -> Source:
        """The source with the data set's idea of an event, if it is of the same format.

        Raises:
            UserError: options that were ``given`` say otherwise.
        """
        if source.name != self.manifest.options["format"]:
            return source
        decided = {name: self.manifest.options[name] for name in source.events_decided_by}
        self._refuse_others({name: source.options[name] for name in decided}, given)
        changes: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in decided.items()}
        return replace(source, **changes)  # type: ignore[type-var]  # every source is a dataclass

    def _refuse_others(self, options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        for name in options.keys() & given.keys():
            was, wanted = self.manifest.options[name], options[name]
            if (list(wanted) if isinstance(wanted, tuple) else wanted) != was:
                raise UserError(f"--{name}: {self.folder} was prepared with {was!r}; leave it out, --like gives it")


def all_in(split: str) -> SplitRule:
    """Every patient goes to ``split``."""
    train, valid, test = (float(name == split) for name in SPLITS)
    return SplitRule(fractions=(train, valid, test))
