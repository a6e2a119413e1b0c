from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest

from pipeline.prepare import sort_samples
from pipeline.prepare.name_hashes import Hashes, hash_names
from pipeline.prepare.sources.labels import Labels
from pipeline.schema import PATIENT_ID

Tabulate = Callable[[Labels], pl.DataFrame]


@pytest.fixture
def tabulate(monkeypatch: pytest.MonkeyPatch) -> Tabulate:
    """Return a function that returns all samples by patient and time, with names, which labels have as hashes alone."""
    names: dict[tuple[int, int], str] = {}

    def note(named: pl.Series) -> tuple[Hashes, Hashes]:
        first, second = hash_names(named)
        names.update(zip(zip(first.tolist(), second.tolist(), strict=True), named, strict=True))
        return first, second

    def make_frame(labels: Labels) -> pl.DataFrame:
        records = labels.samples.records.read((None, None))
        keys = zip(records["first"].tolist(), records["second"].tolist(), strict=True)
        patient = pl.Series(PATIENT_ID, [names[key] for key in keys], dtype=pl.String)
        return pl.DataFrame([patient, *labels.to_columns(records)]).sort(PATIENT_ID, maintain_order=True)

    monkeypatch.setattr(sort_samples, "hash_names", note)
    return make_frame
