"""YAIB, Yet Another ICU Benchmark: ``dyn.parquet`` on an hourly grid and ``sta.parquet``, a column a variable.

``outc.parquet`` beside them holds the labels: one of each stay, or, with a column ``time``, one of each hour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

from pipeline.prepare.sort_samples import Hide
from pipeline.prepare.sources.labels import Labels, read_labels
from pipeline.prepare.sources.layout import MINUTES_OF_UNIT, TIME
from pipeline.prepare.sources.listing import Listing
from pipeline.prepare.sources.reading import read_column_names
from pipeline.prepare.sources.table import Table

DYNAMIC: Final = "dyn.parquet"
STATIC: Final = "sta.parquet"
OUTCOMES: Final = "outc.parquet"


def is_yaib(path: Path) -> bool:
    return (path / DYNAMIC).is_file()


@dataclass(frozen=True, kw_only=True)
class Yaib(Table):
    """The folder of one task and source.  A row of the grid whose cells are all null is no event."""

    name: ClassVar[str] = "yaib"
    wanted: ClassVar[str] = f"{DYNAMIC} here; name the folder of a task and source"

    wide: bool | None = True
    static_tables: tuple[str, ...] = (STATIC,)

    def list_events(self) -> Listing:
        files = (self.path / name for name in (DYNAMIC, STATIC))
        return Listing([path for path in files if path.is_file()])

    def find_side_files(self) -> dict[str, Path | None]:
        outcomes = self.path / OUTCOMES
        return super().find_side_files() | {"labels": self.labels or (outcomes if outcomes.is_file() else None)}

    def read_labels(self, hide: Hide | None = None) -> Labels | None:
        """Return the labels of ``--labels``, else those of the task's own file."""
        path = self.find_side_files()["labels"]
        if path is None or self.labels is not None:
            return super().read_labels(hide)
        time = self.time_column or TIME
        if time not in read_column_names(path):
            return read_labels(path, self.label_columns, hide)
        unit = MINUTES_OF_UNIT[self.time_unit or "minutes"]
        return read_labels(path, replace(self.label_columns, time=time, minutes_of_unit=unit), hide)
