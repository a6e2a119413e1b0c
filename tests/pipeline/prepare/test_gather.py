from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.prepare import gather
from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.sources.synthetic import Synthetic


def test_gathered_in_groups_counts_are_the_same_and_moments_to_the_last_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 10})
    source, options = Synthetic(num_patients=60), BuildOptions(events_per_shard=4000)
    build(source, tmp_path / "at_once", options)
    monkeypatch.setattr("pipeline.prepare.gather.GROUP", 2)
    merged: list[tuple[str, int]] = []

    def merge(paths: Sequence[Path], target: Path) -> None:
        merged.append((target.name, len(paths)))
        of_moments(paths, target)

    of_moments = gather.MERGERS["moments"]
    monkeypatch.setattr(gather, "MERGERS", {**gather.MERGERS, "moments": merge})
    build(source, tmp_path / "in_groups", options)
    assert len(merged) > 3
    assert merged[-1] == ("all", len(merged) - 1)
    assert all(number <= 2 for _, number in merged[:-1])
    one, other = (pq.read_table(tmp_path / name / "vocabulary.parquet") for name in ("at_once", "in_groups"))
    for name in ("variable", "count"):
        assert one[name] == other[name]
    for name in ("mean", "std"):
        np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), rtol=1e-12)
