"""The options that, with the source, decide the content of a data directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pipeline.options import Section, option
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.reference import ReferenceDataSet
from pipeline.prepare.rules import Rules
from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.source import Source
from pipeline.prepare.splits import SplitRule

EVENTS_PER_SHARD: Final = 1 << 21


@dataclass(frozen=True, kw_only=True)
class ShardOptions(Section):
    """The shards that are written."""

    events_per_shard: int = option(EVENTS_PER_SHARD, "Approximate number of events per shard.", minimum=1)
    shard_format: Literal["parquet", "webdataset", "both"] = option("parquet", "File format of the shards.")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ShardOptions):
    """What decides the output besides the source."""

    split_rule: SplitRule = field(default_factory=SplitRule)  # for patients of whom the source does not say
    rules: Rules = field(default_factory=Rules)
    pseudonyms: Pseudonyms | None = None  # replaces patients' ids
    reference: ReferenceDataSet | None = None  # its vocabulary and statistics replace the source's, splits included

    @property
    def hide(self) -> Hide | None:
        """Return what makes patients' names those of the data set, if they are others."""
        return self.pseudonyms.hide_names if self.pseudonyms else None

    def describe(self, source: Source) -> dict[str, Any]:
        """Return everything that decides the output besides the input's files, as the manifest holds it."""
        return {
            "format": source.name,
            **source.options,
            **vars(self.split_rule),
            **self.rules.options,
            **{name: getattr(self, name) for name in ("events_per_shard", "shard_format")},
            "pseudonym_key": self.pseudonyms and self.pseudonyms.fingerprint,
            "like": self.reference and self.reference.manifest.fingerprint,
        }
