from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from pipeline.prepare.clean import clean
from pipeline.prepare.sources.synthetic import Synthetic
from tests.pipeline.prepare.sources.conftest import Tabulate


def rows(source: Synthetic) -> pl.DataFrame:
    frames = [clean(next(source.read(piece))) for piece in source.pieces()]
    assert not any(rejected.height for _, rejected in frames)
    return pl.concat([kept for kept, _ in frames])


def test_stays_are_like_those_of_an_icu() -> None:
    source = Synthetic(num_patients=400)
    events = rows(source)
    per_patient = events.group_by("patient_id").agg(pl.len(), sets=pl.col("minute").n_unique())
    assert per_patient.height == 400
    assert 300 < per_patient["len"].median() < 500
    assert 60 < per_patient["sets"].mean() < 80
    assert 5.5 < events.height / per_patient["sets"].sum() < 6.8
    assert events["variable"].n_unique() == 40
    assert events["minute"].is_between(0, 48 * 60).all()
    assert 0 < events["value"].null_count() < 0.2 * events.height


def test_histories_are_heavy_tailed() -> None:
    lengths = rows(Synthetic(num_patients=60, profile="heavy")).group_by("patient_id").len()["len"].to_numpy()
    assert 400 < lengths.min() < 2000
    assert 3000 < np.median(lengths) < 8000
    assert 15_000 < lengths.max() < 70_000


def test_the_seed_decides_everything() -> None:
    first, again, other = (rows(Synthetic(num_patients=20, seed=seed)) for seed in (3, 3, 4))
    assert first.equals(again)
    assert not first.equals(other)


def test_pieces_have_patients_of_their_own(monkeypatch: pytest.MonkeyPatch, tabulate: Tabulate) -> None:
    monkeypatch.setattr("pipeline.prepare.sources.synthetic.PATIENTS_PER_PIECE", {"icu": 8})
    source = Synthetic(num_patients=20)
    first, second = (clean(next(source.read(piece)))[0] for piece in source.pieces()[:2])
    assert set(first["patient_id"]).isdisjoint(second["patient_id"])
    assert first["value"][:100].to_list() != second["value"][:100].to_list()
    given = source.read_labels()
    assert given is not None
    labels = tabulate(given)
    assert labels["patient_id"].to_list() == [f"synthetic-{number:07d}" for number in range(20)]


def test_the_outcome_can_be_learned_but_not_known(tabulate: Tabulate) -> None:
    """The area under the ROC curve of one variable's mean is clearly above chance, and below certainty."""
    from sklearn.metrics import roc_auc_score

    source = Synthetic(num_patients=1000)
    given = source.read_labels()
    assert given is not None
    labels = tabulate(given)
    assert 0.15 < labels["label"].mean() < 0.25
    events = rows(source).cast({"patient_id": pl.String})
    means = events.group_by("patient_id", "variable").agg(pl.col("value").mean()).join(labels, on="patient_id")
    scores = [
        roc_auc_score(part["label"], part["value"])
        for _, part in means.drop_nulls().group_by("variable", maintain_order=True)
    ]
    best = max(abs(score - 0.5) for score in scores)
    assert 0.2 < best < 0.48
