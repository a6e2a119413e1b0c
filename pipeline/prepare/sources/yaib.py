"""YAIB, Yet Another ICU Benchmark: ``dyn.parquet`` on an hourly grid and ``sta.parquet``, a column a variable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from pipeline.prepare.sources.listing import Listing
from pipeline.prepare.sources.table import Table

DYNAMIC: Final = "dyn.parquet"
STATIC: Final = "sta.parquet"
"""``outc.parquet`` beside them holds the labels, which are no events."""


def is_yaib(path: Path) -> bool:
    return (path / DYNAMIC).is_file()


@dataclass(frozen=True, kw_only=True)
class Yaib(Table):
    """The folder of one task and source.  A row of the grid whose cells are all null is no event."""

    name: ClassVar[str] = "yaib"

    wide: bool | None = True
    static_tables: tuple[str, ...] = (STATIC,)

    def list_events(self) -> Listing:
        files = (self.path / name for name in (DYNAMIC, STATIC))
        return Listing([path for path in files if path.is_file()])

    def find_events(self) -> dict[str, Path]:
        return self.name_files(self.list_events().files, f"{DYNAMIC} here; name the folder of a task and source")
