"""Detect the format of an input, and open it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from pipeline.prepare.sources.meds import Meds, is_meds
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.physionet2012 import PhysioNet2012, is_record
from pipeline.prepare.sources.source import Source
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table, is_table
from pipeline.schema import SPLITS, UserError

Format: TypeAlias = Literal["auto", "physionet2012", "meds", "patient_files", "table", "synthetic"]
_SOURCES: Final[tuple[type[Source], ...]] = (PhysioNet2012, Meds, PatientFiles, Table, Synthetic)
FORMATS: Final = {source.name: source for source in _SOURCES}


def detect_format(path: Path) -> str:
    """Return the format of what lies at ``path``; raise UserError where it is none."""
    if path == Path("synthetic") and not path.exists():
        return "synthetic"
    if not path.is_dir():
        return "table"
    if is_meds(path):
        return "meds"
    if any(any((path / split).glob("*.parquet")) for split in SPLITS):
        return "patient_files"
    if any(is_record(file) for file in path.iterdir()):
        return "physionet2012"
    if any(is_table(file) for file in path.rglob("*")):
        return "table"
    raise UserError(f"{path}: nothing here that any format reads; name another folder, or say --format")


def open_source(path: Path, format_name: str, options: Mapping[str, Any]) -> Source:
    """Return the source for ``path``: a file, a folder, a pattern, or the word ``synthetic``.

    Raises:
        UserError: there is no such input, or one of the ``options`` that were set is not one of the format's.
    """
    if format_name == "auto":
        format_name = detect_format(path)
    format_ = FORMATS[format_name]
    known = {field.name for field in fields(format_)} - set(format_.unused)
    for name in options:
        if name not in known:
            raise UserError(f"--{name}: not used by --format {format_name}; leave it out")
    # Workers may have other current folders.
    options = {name: value.absolute() if isinstance(value, Path) else value for name, value in options.items()}
    if format_ is Synthetic:
        return format_(**options)
    if not path.exists() and not glob.has_magic(str(path)):
        raise UserError(f"{path}: no such file or folder")
    if format_ is not Table and not path.is_dir():
        raise UserError(f"{path}: not a folder; --format {format_name} reads one")
    return format_(path=path.absolute(), **options)
