"""Folds, summaries and comparisons of ``benchmarks.crossfit`` and ``benchmarks.stack``, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.crossfit import BAR, compare, pack_folds, split_stays, unpack_folds
from training.teacher import fit_stack


def test_each_stay_is_in_one_fold_and_outcomes_are_spread() -> None:
    label = np.array([1] * 20 + [0] * 80)
    tests = []
    for fold in range(5):
        splits = split_stays(label, 5, 3, fold)
        assert sorted(np.concatenate(list(splits.values()))) == list(range(100))
        assert [len(splits[name]) for name in ("train", "valid", "test")] == [64, 16, 20]
        assert label[splits["test"]].sum() == 4
        tests.append(splits["test"])
    assert sorted(np.concatenate(tests)) == list(range(100))
    assert not np.array_equal(split_stays(label, 5, 4, 0)["test"], tests[0])


def test_a_better_model_is_better_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    good, poor = (np.clip(0.5 + c * (label - 0.5) + rng.normal(0, 0.2, (2, 400)), 0.01, 0.99) for c in (0.6, 0.2))
    result = compare(label, {BAR: poor, "better": good, "the same": poor})
    auroc = np.mean([roc_auc_score(label, row) for row in good])
    assert result["models"]["better"]["auroc"][0] == pytest.approx(auroc, abs=1e-5)
    found = result["against_the_bar"]["better"]
    assert found["auroc"]["low"] > 0
    assert found["log_loss"]["high"] < 0
    assert abs(found["log_loss"]["z"]) > 3
    assert result["against_the_bar"]["the same"]["auroc"]["difference"] == 0


def test_the_stack_learns_and_ignores_what_was_never_recorded() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 300)
    x = np.column_stack([label + rng.normal(0, 0.7, 300), rng.normal(0, 1, 300), np.full(300, np.nan)])
    x[rng.random(300) < 0.2, 1] = np.nan
    found = fit_stack(x[:200], label[:200], x[200:], seeds=(0,))
    assert found.keys() == {"boosted trees", "wide linear", "extra trees", "stack"}
    assert all(roc_auc_score(label[200:], answer) > 0.75 for answer in found.values())


def test_predictions_of_folds_go_on_elsewhere(tmp_path: Path) -> None:
    label = np.array([1, 0, 0, 0, 0] * 20)
    stays = split_stays(label, 5, 1, 2)["test"]
    path = tmp_path / "folds" / "a model, small" / "1_2.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"stays": stays.tolist(), "probability": (stays / 128).tolist()}))
    pack_folds(tmp_path / "folds", tmp_path / "kept.npz")
    unpack_folds(tmp_path / "kept.npz", tmp_path / "others", label, 5)
    assert json.loads((tmp_path / "others" / "a model, small" / "1_2.json").read_text()) == json.loads(path.read_text())
