"""The boosted trees of the outcome head: when there are some, what they learn from, and that they stay with a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import GradientBoostingClassifier

import training.trees
from model.config import ModelOptions, Part
from model.features import VariableLayout, summary_features
from model.losses import LossOptions
from model.prefixes import Prefixes
from model.trees import BoostedTrees
from pipeline.dataset.tasks import SampleCounts
from pipeline.schema import UserError
from tests.model.helpers import NUM_CODES, random_batch
from tests.training.runs import assert_same, read_summary, run, weights, write_tiny_data
from tests.training.test_teacher import ALONE, open_data
from training.options import RunOptions, TrainOptions
from training.state import build_model
from training.trees import choose_tree_share, fit_trees


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "data")


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=8, deadline=None)
def test_trees_answer_as_those_of_the_library_that_fitted_them(seed: int, is_weighted: bool) -> None:
    """To the last bits of their sum, also on samples that the fit has not seen."""
    rng = np.random.default_rng(seed)
    batches = [random_batch([rng.integers(1, 9, rng.integers(1, 4)).tolist() for _ in range(40)], s) for s in (1, 2)]
    trees = BoostedTrees(NUM_CODES)
    trees.place[1:] = torch.arange(NUM_CODES - 1)
    seen, other = (
        (summary_features(batch, pairs), pairs) for batch in batches for pairs in [VariableLayout.build(batch)]
    )
    label = rng.permutation([0, 1] * 20)
    weight = rng.uniform(0.1, 1, 40).astype(np.float32) if is_weighted else np.ones(40, np.float32)
    fitted = []

    class Kept(GradientBoostingClassifier):
        def fit(self, *given: object) -> GradientBoostingClassifier:
            fitted.append(super().fit(*given))
            return fitted[-1]

    table = trees.tabulate(*seen).numpy()
    with mock.patch("sklearn.ensemble.GradientBoostingClassifier", Kept):
        training.trees._fit(trees, table, label, weight, seed=seed)
    columns = training.trees._choose_columns(table)
    for features, variables in (seen, other):
        expected = fitted[0].decision_function(trees.tabulate(features, variables).numpy()[:, columns])
        np.testing.assert_allclose(trees(features, variables).numpy(), expected, atol=1e-5)


def test_columns_vary_and_are_there_once() -> None:
    first = np.array([[1.0, 1, 2, -9], [1, 3, 2, 4]], np.float32)
    second = np.array([[1.0, 1, 2, 9], [1, 3, 2, 4]], np.float32)
    assert training.trees._choose_columns(np.hstack([first, second])).tolist() == [1, 3, 7]


@pytest.mark.parametrize("threshold", [0.1, -0.1, 1e-30, 0.5, -1024.0, np.pi])
def test_what_is_at_most_a_threshold_is_at_most_its_rounding(threshold: float) -> None:
    rounded = np.float32(training.trees._round_down(threshold))
    assert float(rounded) <= threshold < float(np.nextafter(rounded, np.float32(np.inf)))


@pytest.mark.parametrize(
    ("share", "without", "objective", "labelled", "expected"),
    [
        ("auto", "nothing", "joint", 500, 0.25),
        ("auto", "contexts", "supervised", 500, 0.25),
        ("auto", "nothing", "joint", 499, 0.0),
        ("auto", "nothing", "joint", 50_001, 0.0),
        ("auto", "summary_features", "joint", 500, 0.0),
        ("auto", "nothing", "pretrain", 500, 0.0),
        (0.0, "nothing", "joint", 500, 0.0),
        (0.5, "nothing", "joint", 20, 0.5),
        (0.5, "nothing", "pretrain", 20, 0.0),
    ],
)
def test_what_share_there_is(
    data: Path, share: float, without: Part, objective: str, labelled: int, expected: float
) -> None:
    opened = open_data(data)
    counts = SampleCounts(num_labelled=labelled, class_counts=[labelled - labelled // 5, labelled // 5])
    task = dataclasses.replace(opened.tasks[0], splits={"train": counts})
    opened = dataclasses.replace(opened, tasks=(task,))
    options = ModelOptions(tree_share=share, without=without)
    assert choose_tree_share(options, LossOptions(objective=objective), opened) == expected


def test_what_has_no_trees_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--tree_share 0\.5 needs the summary features"):
        choose_tree_share(ModelOptions(tree_share=0.5, without="summary_features"), LossOptions(), open_data(data))
    with pytest.raises(UserError, match=r"--tree_share 0\.5 is for one binary task"):
        choose_tree_share(ModelOptions(tree_share=0.5), LossOptions(), open_data(data, None))
    one = np.zeros((3, 2), np.float32), np.ones(3, np.int64), np.ones(3, np.float32)
    with pytest.raises(UserError, match="--tree_share needs training samples of both classes"):
        training.trees._fit(BoostedTrees(NUM_CODES), *one, seed=0)
    monkeypatch.setattr("training.teacher.MOST_TAUGHT", 3)
    with pytest.raises(
        UserError, match=r"--tree_share 0\.5: trees are fitted to at most 3 samples, and .* have a label"
    ):
        choose_tree_share(ModelOptions(tree_share=0.5), LossOptions(), open_data(data))


def test_trees_learn_from_labelled_training_samples_alone_and_from_their_first_hours_when_asked(data: Path) -> None:
    opened, found = open_data(data), []
    options = TrainOptions(data=opened.options, run=RunOptions(output_dir="-"), model=ModelOptions(tree_share=0.5))
    model = build_model(options, opened)
    with mock.patch.object(training.trees, "_fit", lambda trees, *given, seed: found.append((trees, *given))):
        for loss in (LossOptions(), LossOptions(prefix_weight=0.6)):
            fit_trees(model, opened, ALONE, loss, seed=0)
    (trees, plain, label, weight), (_, longer, labels, weights_) = found
    batches = list(opened.open_loader("train", seed=0, shuffle=False, world=ALONE))
    known = [int(number) for batch in batches for number in batch.label if number >= 0]
    assert sorted(label.tolist()) == sorted(known)
    assert set(weight.tolist()) == {1.0}
    assert len(labels) == 4 * len(label)
    assert sorted(weights_.tolist()) == pytest.approx([0.2] * 3 * len(label) + [1.0] * len(label))
    rows = {row.tobytes() for row in longer}
    for batch in batches:
        early = Prefixes.after_hours(batch, (12.0, 24.0, 36.0)).separate(batch)
        for samples in (batch, early):
            pairs = VariableLayout.build(samples)
            table = trees.tabulate(summary_features(samples, pairs), pairs).numpy()
            assert all(row.tobytes() in rows for row in table[samples.label.numpy() >= 0])
    assert {row.tobytes() for row in plain} < rows


def test_trees_stay_with_their_run(data: Path, tmp_path: Path) -> None:
    """They are fitted once, resumed as they are, and what other labels gave is not taken from ``--init_from``."""
    flags = ["--tree_share", "0.5"]
    assert run(data, tmp_path / "whole", *flags) == 0
    assert run(data, tmp_path / "parts", *flags, "--stop_after", "1") == 0
    with mock.patch.object(training.trees, "_fit", side_effect=AssertionError("a resumed run keeps its trees")):
        assert run(data, tmp_path / "parts", *flags, "--resume") == 0
    for which in ("model", "ema_model"):
        assert_same(weights(tmp_path / "parts", which=which), weights(tmp_path / "whole", which=which))
    assert run(data, tmp_path / "none") == 0
    plain, trained = (weights(tmp_path / name) for name in ("none", "whole"))
    assert_same(plain, {name: tensor for name, tensor in trained.items() if not name.startswith("head.trees.")})
    assert read_summary(tmp_path / "none")["test"] != read_summary(tmp_path / "whole")["test"]
    last = str(tmp_path / "none" / "checkpoints" / "last.pt")
    assert run(data, tmp_path / "tuned", *flags, "--init_from", last) == 0
    assert torch.equal(weights(tmp_path / "tuned")["head.trees.answer"], trained["head.trees.answer"])
    last = str(tmp_path / "whole" / "checkpoints" / "last.pt")
    assert run(data, tmp_path / "other", "--tree_share", "0.25", "--init_from", last, "--seed", "1") == 0
    assert not torch.equal(weights(tmp_path / "other")["head.trees.answer"], trained["head.trees.answer"])
    assert run(data, tmp_path / "off", "--init_from", last) == 0
