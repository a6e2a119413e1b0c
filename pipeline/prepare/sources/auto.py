"""Detect the format of an input, and open it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from pipeline.prepare.sources.listing import is_table, list_files
from pipeline.prepare.sources.meds import Meds, find_meds
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.physionet2012 import PhysioNet2012, is_record
from pipeline.prepare.sources.physionet2019 import PhysioNet2019, is_physionet2019
from pipeline.prepare.sources.source import Source
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table
from pipeline.prepare.sources.yaib import Yaib, is_yaib
from pipeline.schema import SPLITS, UserError

Format: TypeAlias = Literal[
    "auto", "physionet2012", "physionet2019", "meds", "yaib", "patient_files", "table", "synthetic"
]
_SOURCES: Final[tuple[type[Source], ...]] = (PhysioNet2012, PhysioNet2019, Meds, Yaib, PatientFiles, Table, Synthetic)
FORMATS: Final = {source.name: source for source in _SOURCES}


def detect_format(path: Path) -> str:
    """Return the format of what lies at ``path``; raise UserError where it is none."""
    if path == Path("synthetic") and not path.exists():
        return "synthetic"
    if path.exists() and find_meds(path) is not None:
        return "meds"
    if not path.is_dir():
        return "table"
    if is_yaib(path):
        return "yaib"
    if is_physionet2019(path):
        return "physionet2019"
    if any(any((path / split).glob("*.parquet")) for split in SPLITS):
        return "patient_files"
    if any(is_record(file) for file in (*path.iterdir(), *path.glob("*/*.txt"))):
        return "physionet2012"
    if list_files(path, is_table).files:
        return "table"
    raise UserError(f"{path}: nothing here that any format reads; name another folder, or say --format")


def open_source(path: Path, format_name: str, options: Mapping[str, Any]) -> Source:
    """Return the source for ``path``: a file, a folder, a pattern, or the word ``synthetic``.

    Raises:
        UserError: there is no such input, or one of the ``options`` that were set is not one of the format's.
    """
    if format_name == "auto":
        format_name = detect_format(path)
        top = find_meds(path) if format_name == "meds" else None
        if top is not None and top.absolute() != path.absolute():
            raise UserError(f"{path}: is part of the MEDS data set {top}; name that folder")
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
