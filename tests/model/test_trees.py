"""Boosted trees as buffers of the model: against a walk down each tree, and their share in the outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import Outcome
from model.features import NUM_FEATURES, VariableLayout, summary_features
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from model.program import DenseModel, export_program, to_rectangles
from model.seqsetvae import SeqSetVAE
from model.trees import ABSENT, DEPTH, NUM_TREES, STEPS_PER_UNIT, BoostedTrees
from pipeline.loading.batch import PatientBatch
from pipeline.schema import UserError
from tests.model.helpers import NUM_CODES, random_batch, tiny_model


def plant(trees: BoostedTrees, seed: int = 0) -> BoostedTrees:
    """Trees that ask anything: of all variables but one, whose places are in another order than their codes."""
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * trees.num_variables * NUM_FEATURES
    trees.place[1:-1] = torch.randperm(NUM_CODES - 2, generator=generator)
    trees.feature.copy_(torch.randint(columns, trees.feature.shape, generator=generator))
    trees.threshold.copy_(torch.randn(trees.threshold.shape, generator=generator))
    trees.answer.copy_(torch.randn(trees.answer.shape, generator=generator) / 10)
    trees.bias.fill_(0.5)
    return trees


def walk(trees: BoostedTrees, batch: PatientBatch) -> list[float]:
    """What the trees answer of each patient, by loops."""
    variables, answers = VariableLayout.build(batch), []
    features = summary_features(batch, variables)
    for patient in range(batch.num_patients):
        row = [fill for fill in (-ABSENT, ABSENT) for _ in range(trees.num_variables * NUM_FEATURES)]
        for pair in torch.nonzero(variables.patient == patient)[:, 0].tolist():
            place = int(trees.place[variables.code[pair]])
            for feature, value in enumerate(features[pair].tolist() if place < trees.num_variables else []):
                for half in (0, trees.num_variables):
                    row[(half + place) * NUM_FEATURES + feature] = round(value * STEPS_PER_UNIT) / STEPS_PER_UNIT
        total = float(trees.bias)
        for tree in range(NUM_TREES):
            node = 0
            for _ in range(DEPTH):
                node = 2 * node + 1 + (row[int(trees.feature[tree, node])] > float(trees.threshold[tree, node]))
            total += float(trees.answer[tree, node - (2**DEPTH - 1)])
        answers.append(total)
    return answers


def test_a_tree_by_hand() -> None:
    """Is the mean of code 3 at most 0?  Who has none goes with the small in one tree, with the great in another."""
    batch = random_batch([[2], [2], [2]])
    batch.code[:] = torch.tensor([3, 3, 3, 3, 5, 5])
    batch.value[:] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    batch.has_value[:] = True
    trees = BoostedTrees(NUM_CODES)
    trees.place[3] = 4
    trees.bias.fill_(2.0)
    for tree, half in ((0, 0), (1, trees.num_variables)):
        trees.feature[tree, 0] = (half + 4) * NUM_FEATURES
        trees.threshold[tree, 0] = 0.0
        trees.answer[tree, 0], trees.answer[tree, 4] = -(10.0**tree), 10.0**tree  # below a leaf all nodes lead left
    variables = VariableLayout.build(batch)
    assert trees(summary_features(batch, variables), variables).tolist() == [2 - 11, 2 + 11, 2 - 1 + 10]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_trees_are_walked_from_root_to_leaf(sizes: list[list[int]], seed: int) -> None:
    batch, trees = random_batch(sizes, seed=seed), plant(BoostedTrees(NUM_CODES), seed)
    variables = VariableLayout.build(batch)
    found = trees(summary_features(batch, variables), variables)
    torch.testing.assert_close(found, torch.tensor(walk(trees, batch)), atol=1e-4, rtol=1e-5)


def model_with_trees(share: float) -> SeqSetVAE:
    model = tiny_model(tree_share=share).eval()
    plant(model.head.trees)
    return model


def test_trees_have_their_share_of_the_logit_in_evaluation_alone() -> None:
    batch = random_batch([[3, 4, 2], [5], [1, 6]])
    of_heads = tiny_model().eval()(batch).logits[0]
    odds = of_heads[..., 1] - of_heads[..., 0]
    model = model_with_trees(0.25)
    of_trees = torch.tensor(walk(model.head.trees, batch))
    found = model(batch).logits[0]
    torch.testing.assert_close(found[..., 1] - found[..., 0], 0.75 * odds + 0.25 * of_trees[:, None])
    alone = model_with_trees(1.0)(batch)
    torch.testing.assert_close(alone.probability, torch.sigmoid(of_trees))
    prepared = PreparedBatch.build(batch, seed=7, step=1)
    trained, plain = model.train()(prepared).logits[0], tiny_model().train()(prepared).logits[0]
    assert torch.equal(trained, plain), "in training each head learns by itself"


def test_samples_that_share_passes_and_rectangles_have_the_same_trees() -> None:
    batch, model = random_batch([[3, 1, 2, 4], [2]]), model_with_trees(1.0)
    prefixes = Prefixes(torch.tensor([1, 0, 0]), torch.tensor([1, 2, 4]))
    with torch.no_grad():
        shared = model(PreparedBatch.build(batch, prefixes=prefixes)).probability
        separate = model(prefixes.separate(batch)).probability
        rectangles = DenseModel(model).eval()(*to_rectangles(prefixes.separate(batch)))[0][:, 1]
    torch.testing.assert_close(shared, separate)
    torch.testing.assert_close(rectangles, separate)


def test_the_program_has_the_trees() -> None:
    model = tiny_model(levels=1, layers=1, tree_share=0.5).eval()
    plant(model.head.trees)
    found = export_program(model).module()
    batch = random_batch([[3, 1, 2, 4], [2]])
    with torch.no_grad():
        torch.testing.assert_close(found(*to_rectangles(batch))[0][:, 1], model(batch).probability)


@pytest.mark.parametrize(
    "changes",
    [
        {"tree_share": -0.1},
        {"tree_share": 1.1},
        {"tree_share": 0.5, "without": "summary_features"},
        {"tree_share": 0.5, "variable_axis": False},
        {"tree_share": 0.5, "outcomes": (Outcome(kind="regression", classes=()),)},
        {"tree_share": 0.5, "outcomes": (Outcome(name="a"), Outcome(name="b"))},
    ],
)
def test_shares_that_no_model_has(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="tree_share"):
        tiny_model(**changes)
