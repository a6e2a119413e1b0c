"""Which format an input is, and the source for it."""

from __future__ import annotations

import glob
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from pipeline.prepare.sources.meds import Meds, is_meds
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.physionet2012 import PhysioNet2012, is_record
from pipeline.prepare.sources.source import Source
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table, is_table
from pipeline.schema import SPLITS, UserError

FORMATS: Final[dict[str, Any]] = {
    "physionet2012": PhysioNet2012,
    "meds": Meds,
    "patient_files": PatientFiles,
    "table": Table,
    "synthetic": Synthetic,
}


def detect_format(path: Path) -> str:
    """The format of what lies at ``path``; the bare word ``synthetic`` is a format of its own.

    Raises:
        UserError: nothing is there, or nothing of any format.
    """
    if path == Path("synthetic") and not path.exists():
        return "synthetic"
    if path.is_dir():
        if is_meds(path):
            return "meds"
        if any(any((path / split).glob("*.parquet")) for split in SPLITS):
            return "patient_files"
        if any(is_record(file) for file in path.iterdir()):
            return "physionet2012"
        if any(is_table(file) for file in path.rglob("*")):
            return "table"
        raise UserError(f"{path}: nothing here that any format reads; name another folder, or say --format")
    return "table"


def open_source(path: Path, format_name: str, options: dict[str, Any]) -> Source:
    """The source for ``path``.

    Args:
        format_name: a key of ``FORMATS``, or ``auto``.
        options: fields of the source's class, by name.

    Raises:
        UserError: there is no such input, or an option is not one of the format's.
    """
    if format_name == "auto":
        format_name = detect_format(path)
    made = FORMATS[format_name]
    known = {field.name for field in fields(made)}
    for name in options:
        if name not in known:
            raise UserError(f"--{name.removesuffix('_file')}: not used by --format {format_name}; leave it out")
    if "path" in known:
        if not path.exists() and not glob.has_magic(str(path)):
            raise UserError(f"{path}: no such file or folder")
        if format_name != "table" and not path.is_dir():
            raise UserError(f"{path}: not a folder; --format {format_name} reads one")
        options = {"path": path.absolute(), **options}  # other machines may work elsewhere
    source: Source = made(**options)
    return source
