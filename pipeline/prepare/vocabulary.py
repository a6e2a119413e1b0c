"""Make the vocabulary of the train split's moments."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.dataset.schemas import VOCABULARY_SCHEMA
from pipeline.prepare.clean import RESERVED_VARIABLES
from pipeline.prepare.moments import Moments
from pipeline.prepare.rules import Limits
from pipeline.schema import FIRST_CODE


def make_vocabulary(
    train: Moments,
    statistics: Mapping[str, tuple[float, float]],
    min_count: int = 1,
    limits: Limits = MappingProxyType({}),
    descriptions: Mapping[str, str] = MappingProxyType({}),
) -> pa.Table:
    """Return ``VOCABULARY_SCHEMA``: padding, unknown, then the train split's variables in the order of their names.

    Values are scaled with ``mean`` and ``std``, so a std of 0 is 1; ``statistics`` replace those of some variables.
    Variables with fewer events than ``min_count`` are left out, unless they have ``limits``.
    """
    rows: list[tuple[Any, ...]] = [(name, 0, 0.0, 1.0, None, None, None) for name in RESERVED_VARIABLES]
    assert len(rows) == FIRST_CODE
    moments = zip(train.variables, train.count.tolist(), train.mean.tolist(), train.std.tolist(), strict=True)
    for variable, count, mean, std in moments:
        if count >= min_count or variable in limits:
            scale = statistics.get(variable, (mean, std))
            low, high = limits.get(variable, (None, None))
            rows.append((variable, count, scale[0], scale[1] or 1.0, low, high, descriptions.get(variable)))
    columns = [range(len(rows)), *zip(*rows, strict=True)]
    return pa.table(dict(zip(VOCABULARY_SCHEMA.names, map(list, columns), strict=True)), schema=VOCABULARY_SCHEMA)


def vocabulary_fingerprint(vocabulary: pa.Table) -> str:
    """Return the sha256 of names, means and stds, in the order of their codes."""
    digest = hashlib.sha256()
    for variable in vocabulary["variable"].to_pylist():
        encoded = variable.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    for name in ("mean", "std"):
        digest.update(vocabulary[name].to_numpy().astype("<f8").tobytes())
    return digest.hexdigest()
