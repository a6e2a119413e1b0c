"""The lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Self

from pipeline.schema import UserError
from pipeline.storage.files import write_atomically


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a :class:`JsonLines` file, without a last line that is being written or was cut short."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object; move the file away")
        records.append(record)
    return records


class JsonLines:
    """An append-only file of one flat JSON object a line, each flushed as it is written.

    A run that goes on from a state in which it had written ``keep`` lines writes the later ones again, so these are
    dropped; a last line that a crash cut short is dropped in any case.  ``num_lines`` counts what is there.
    """

    def __init__(self, path: Path, *, keep: int | None = None) -> None:
        self.num_lines = 0
        if path.exists():
            kept = [json.dumps(record) + "\n" for record in read_json_lines(path)[:keep]]
            write_atomically(path, "".join(kept).encode())
            self.num_lines = len(kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, str | float | None]) -> None:
        """Append ``record``; a number that is not finite becomes null, for JSON has no other word for it."""
        unknown = {name: None for name, value in record.items() if isinstance(value, float) and not isfinite(value)}
        self._file.write(json.dumps({**record, **unknown}, allow_nan=False) + "\n")
        self._file.flush()
        self.num_lines += 1

    def close(self) -> None:
        """Wait until all is on the disk, and close."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
