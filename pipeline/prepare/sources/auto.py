"""Detect the format of an input, and open it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from pipeline.prepare.sources.listing import is_parquet, is_table, list_files, list_tables
from pipeline.prepare.sources.meds import COLUMNS, NUMERIC_VALUE, SPLIT_MAP, SUBJECT_ID, Meds
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.prepare.sources.physionet2012 import PhysioNet2012, is_record
from pipeline.prepare.sources.physionet2019 import PhysioNet2019, is_physionet2019
from pipeline.prepare.sources.reading import read_column_names
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


def find_meds(path: Path) -> Path | None:
    """Return the folder of the MEDS data set that a path is, or is part of; None where it is neither.

    MEDS is known by its columns.  Without ``data`` or ``metadata`` around it, a folder must have the column of numbers
    too, or folders named like MEDS's splits.
    """
    if (path / "data").is_dir() and any(map(_has_columns, list_tables(path / "data", is_parquet)[:1])):
        return path
    if not path.is_dir() and not is_parquet(path):
        return None
    first = next(
        (file for file in list_tables(path, is_parquet) if file.relative_to(path).parts[:1] != ("metadata",)), None
    )
    if first is None or not _has_columns(first):
        return None
    place = path.absolute()
    for parent in place.parents:
        if (parent / "metadata").is_dir() and place.is_relative_to(parent / "data"):
            return parent
    is_whole = path.is_dir() and (_has_columns(first, NUMERIC_VALUE) or first.parent.name in dict(SPLIT_MAP))
    return path if is_whole else None


def _has_columns(path: Path, *more: str) -> bool:
    """Return whether a file is Parquet with the columns of MEDS 0.3 or 0.4, and with ``more``."""
    try:
        present = set(read_column_names(path))
    except UserError:
        return False
    return present >= {*COLUMNS, SUBJECT_ID, *more} or present >= {*COLUMNS, "patient_id", NUMERIC_VALUE, *more}


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
