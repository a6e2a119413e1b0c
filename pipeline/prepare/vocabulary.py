"""Make the vocabulary of the train split's moments."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
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
    """Return the vocabulary: padding, unknown, then the train split's variables in the order of their names.

    Args:
        train: moments of the train split.
        statistics: mean and std to use instead, by variable.
        min_count: variables with fewer events are left out, unless they have limits.
        limits: low and high of outliers, by variable; a variable that has them never becomes unknown.
        descriptions: meaning of variables, where it is known.

    Returns:
        ``VOCABULARY_SCHEMA``; ``mean`` and ``std`` are what values are scaled with, so a std of 0 is 1.
    """
    limited = np.array([variable in limits for variable in train.variables], dtype=np.bool_)
    seen = np.flatnonzero((train.count >= max(min_count, 1)) | limited)
    variables = [train.variables[number] for number in seen]
    mean, std = train.mean[seen], train.std[seen]
    for number, variable in enumerate(variables):
        if variable in statistics:
            mean[number], std[number] = statistics[variable]
    std[std == 0] = 1.0
    reserved = len(RESERVED_VARIABLES)
    assert reserved == FIRST_CODE
    bounds = [(None, None)] * reserved + [limits.get(variable, (None, None)) for variable in variables]
    return pa.table(
        {
            "code": np.arange(reserved + len(variables), dtype=np.int32),
            "variable": [*RESERVED_VARIABLES, *variables],
            "count": np.concatenate([np.zeros(reserved, np.int64), train.count[seen]]),
            "mean": np.concatenate([np.zeros(reserved), mean]),
            "std": np.concatenate([np.ones(reserved), std]),
            "low": [low for low, _ in bounds],
            "high": [high for _, high in bounds],
            "description": [None] * reserved + [descriptions.get(variable) for variable in variables],
        },
        schema=VOCABULARY_SCHEMA,
    )


def vocabulary_fingerprint(vocabulary: pa.Table) -> str:
    """Return the sha256 of names, means and stds, in the order of their codes."""
    digest = hashlib.sha256()
    for variable in vocabulary["variable"].to_pylist():
        encoded = variable.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    for name in ("mean", "std"):
        digest.update(vocabulary[name].to_numpy().astype("<f8").tobytes())
    return digest.hexdigest()
