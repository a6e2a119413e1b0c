"""What ``metadata/codes.parquet`` and ``metadata/dataset.json`` of a MEDS data set say of its codes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare import names
from pipeline.prepare.columns import to_patient_names, to_plain, to_variable_names
from pipeline.prepare.sources.reading import SITE, pick_column, reading
from pipeline.prepare.tasks import EXCLUDE_CODES
from pipeline.schema import VARIABLE, UserError

MODIFIERS: Final = "code_modifier_columns"
SITES: Final = "site_id_columns"
"""Keys of ``dataset.json``."""

DECLARED: Final = "declared"
"""Stands for the columns of code modifiers that ``dataset.json`` declares."""

OWN_CODES: Final = "^MEDS_"


def read_declared(path: Path, key: str) -> tuple[str, ...]:
    """Return the columns that ``dataset.json`` declares by a key; none where there is no such file, or no such key."""
    if not path.is_file():
        return ()
    with reading(path, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
    declared = content.get(key) if isinstance(content, dict) else None
    if not isinstance(declared or [], list) or not all(isinstance(name, str) for name in declared or []):
        raise UserError(f"{path}: {key} is no list of names; mend it, or name the columns")
    return tuple(declared or ())


def join_sites(sites: Sequence[pl.Series], num_rows: int) -> pl.Series:
    """Return the column ``site`` of names: of several columns, one text of all; of none, nothing but nulls."""
    if not sites:
        return names.nothing(SITE, num_rows)
    first = names.encode(sites[0], to_patient_names)
    return (join_modifiers(first, sites[1:]) if len(sites) > 1 else first).rename(SITE)


def join_modifiers(code: pl.Series, modifiers: Sequence[pl.Series]) -> pl.Series:
    """Return the names ``CODE//MODIFIER``; a modifier that is missing is left out, and what has no code stays so."""
    parts = [code.cast(pl.String), *map(to_variable_names, modifiers)]
    joined = pl.DataFrame(parts).select(pl.concat_str(pl.all(), separator="//", ignore_nulls=True)).to_series()
    return names.encode(joined.set(code.is_null(), None).alias(VARIABLE))


def read_descriptions(path: Path) -> dict[str, str]:
    """Return each code's descriptions of ``codes.parquet``, each once, in their order."""
    code, description = _read_column(path, "description")
    if description is None:
        return {}
    if _is_list(description.type):
        texts = ["; ".join(text.strip() for text in texts or () if text) for texts in description.to_pylist()]
        description = pa.chunked_array([pa.array(texts, pa.string())])
    frame = pl.DataFrame([code, to_plain(path, "description", description)])
    text = frame.select(pl.col("code", "description").cast(pl.String).str.strip_chars()).drop_nulls()
    text = text.filter(pl.col("description") != "").unique(maintain_order=True)
    return dict(text.group_by("code").agg(pl.col("description").str.join("; ")).iter_rows())


def read_roll_up(path: Path, vocabularies: tuple[str, ...]) -> dict[str, str]:
    """Return by code its nearest ancestor of one of the vocabularies, by the ``parent_codes`` of ``codes.parquet``.

    The vocabulary of ``LOINC/8867-4`` is LOINC.  A code that is of one of them, or has no such ancestor, is not there.
    Of several that are as near, the first counts.  Codes that MEDS itself defines, such as birth, and those that may
    tell an outcome, which tasks find by their names, keep them.

    Raises:
        UserError: there is no such file, or no code has such an ancestor.
    """
    code, parents = _read_column(path, "parent_codes")
    rows = zip(code.cast(pl.String), parents.to_pylist() if parents is not None else [], strict=parents is not None)
    above: dict[str | None, list[str]] = {}
    for name, of_code in rows:
        given = [of_code] if isinstance(of_code, str) else of_code or []
        above.setdefault(name, []).extend(parent for parent in given if isinstance(parent, str))
    found: dict[str, str] = {}
    kept = re.compile("|".join(f"(?i:{expression.removeprefix('(?i)')})" for expression in (OWN_CODES, *EXCLUDE_CODES)))
    for name, nearest in above.items():
        if name is None or _vocabulary(name) in vocabularies or kept.search(name):
            continue
        reached = list(nearest)
        for parent in reached:  # breadth first; it grows
            if _vocabulary(parent) in vocabularies:
                found[name] = parent
                break
            reached += [other for other in above.get(parent, ()) if other not in reached]
    if not found:
        known = sorted({_vocabulary(parent) for parents_of in above.values() for parent in parents_of})
        advice = f"name one of {', '.join(known[:8])}" if known else "it has no parent_codes"
        raise UserError(f"--roll_up {' '.join(vocabularies)}: no code of {path} has such a parent; {advice}")
    return found


def roll_up(code: pl.Series, parents: dict[str, str]) -> pl.Series:
    """Return the names with ``parents`` in place of those that have some."""
    return names.encode(code, lambda texts: texts.replace(parents))


def count_texts(files: Sequence[Path], column: str) -> int:
    """Return how many rows of Parquet files are not null in a column, as far as the files' statistics say."""
    total = 0
    for path in files:
        with reading(path):
            metadata = pq.read_metadata(path)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                known = chunk.path_in_schema == column and chunk.statistics and chunk.statistics.has_null_count
                total += group.num_rows - chunk.statistics.null_count if known else 0
    return total


def _vocabulary(code: str | None) -> str:
    return (code or "").partition("/")[0]


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _read_column(path: Path, name: str) -> tuple[pl.Series, pa.ChunkedArray | None]:
    """Return the codes of ``codes.parquet``, and another of its columns, None where it has no such column."""
    with reading(path):
        table = pq.read_table(path)
    pick_column(path, table.column_names, "code", (), "a header code")
    return to_plain(path, "code", table["code"]), table[name] if name in table.column_names else None
