from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import reconstruction
from model.config import Outcome
from model.losses import (
    DIRECTION_WEIGHT,
    MAGNITUDE_WEIGHT,
    SQUARED_WEIGHT,
    ClassWeights,
    LossOptions,
    Objective,
    beta_at,
    class_weights,
    compute_losses,
    cross_entropy_sum,
    kl_per_dimension,
    kl_sum,
    outcome_sum,
)
from model.prefixes import Prefixes
from model.prepared import PreparedBatch
from model.ragged import SetLayout
from model.reconstruction import chamfer_sums
from model.set_vae import Posterior
from pipeline.schema import Kind
from tests.model import reference
from tests.model.helpers import counts_of, first_hours, random_batch, tiny_model
from training.memory import measure_peak


def test_chamfer_by_hand() -> None:
    """One set: events (1,0), (0,2); decoded (1,0), (3,0).

    Direction: events 0 + 1, outputs 0 + 0.  Magnitude: events 0 + min(1, 1), outputs 0 + 1.  Squared: events 0 +
        min(5, 13),
    outputs 0 + min(4, 13).
    """
    layout = SetLayout.build(torch.tensor([0, 2]))
    sums = chamfer_sums(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]), layout)
    assert [round(s.item(), 5) for s in sums] == [1.0, 2.0, 9.0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 1000))
def test_chamfer_agrees_pair_by_pair(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, output = torch.randn(2, sum(sizes), 4, generator=generator)
    layout = SetLayout.build(torch.tensor([0, *torch.tensor(sizes).cumsum(0)]))
    found = chamfer_sums(target[layout.event_of_slot], output[layout.event_of_slot], layout)
    naive = [reference.decoded_distances(t, y) for t, y in zip(target.split(sizes), output.split(sizes), strict=True)]
    for value, parts in zip(found, zip(*naive, strict=True), strict=True):
        torch.testing.assert_close(value, torch.stack(parts).sum(), atol=1e-4, rtol=1e-5)


def dense_sums(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The sums of one set from all distances at once."""
    product, squares = target @ output.T, [x.square().sum(1) for x in (target, output)]
    norms = [square.clamp_min(1e-12).sqrt() for square in squares]
    direction = 1 - product / (norms[0][:, None] * norms[1])
    magnitude = (norms[0][:, None] - norms[1]).abs()
    squared = (squares[0][:, None] + squares[1] - 2 * product).clamp_min(0)
    return torch.stack([d.amin(0).sum() + d.amin(1).sum() for d in (direction, magnitude, squared)])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 7, 90, 1 << 18]), st.integers(0, 1000))
def test_pieces_give_values_and_gradients_of_the_dense_formula(sizes: list[int], cells: int, seed: int) -> None:
    """Whether a set is a piece, several sets are, or a set is taken in rows."""
    generator = torch.Generator().manual_seed(seed)
    target, output = torch.randn(2, sum(sizes), 6, generator=generator)
    output.requires_grad_()
    layout = SetLayout.build(torch.tensor([0, *torch.tensor(sizes).cumsum(0)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "MAX_CELLS", cells)
        found = torch.stack(chamfer_sums(target[layout.event_of_slot], output[layout.event_of_slot], layout))
    expected = sum(dense_sums(t, y) for t, y in zip(target.split(sizes), output.split(sizes), strict=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.tensor([1.0, 2.0, 3.0])
    gradients = [torch.autograd.grad(sums @ weight, output)[0] for sums in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_of_several_at_the_same_distance_the_first_is_nearest() -> None:
    """Both outputs are equal, so all gradient of the event's way to them goes to the first."""
    layout = SetLayout.build(torch.tensor([0, 2]))
    output = torch.tensor([[1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    target = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    chamfer_sums(target, output, layout)[2].backward()
    # Each output's way to its event gives (-2, 0); the two events' ways go to the first output.
    assert output.grad.tolist() == [[-6.0, 0.0], [-2.0, 0.0]]


def test_a_set_of_five_thousand_events_trains_in_memory_that_grows_with_its_size() -> None:
    """All distances of one kind would be 100 MB alone."""
    model, batch = tiny_model(), random_batch([[5000], [3]])
    prepared = PreparedBatch.build(batch, seed=0)

    def step() -> None:
        compute_losses(model(prepared), batch.label, LossOptions(), counts_of(batch), beta=0.1).total.backward()

    assert measure_peak(step, torch.device("cpu")) < 50e6
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_chamfer_of_a_set_with_itself_is_nothing() -> None:
    x = torch.randn(9, 4)
    layout = SetLayout.build(torch.tensor([0, 9]))
    rows = x[layout.event_of_slot]
    assert all(s.item() == pytest.approx(0, abs=1e-4) for s in chamfer_sums(rows, rows, layout))


def test_distances_stay_in_float32_under_autocast() -> None:
    """In bfloat16 a product of 1.01 with itself would be off in the second digit."""
    generator = torch.Generator().manual_seed(0)
    target, output = torch.randn(2, 9, 4, generator=generator)
    layout = SetLayout.build(torch.tensor([0, 9]))
    target, output = target[layout.event_of_slot], output[layout.event_of_slot]
    exact = chamfer_sums(target, output, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(chamfer_sums(target, output, layout), exact, strict=True))


def test_default_weights_are_the_documented_ones() -> None:
    assert (DIRECTION_WEIGHT, MAGNITUDE_WEIGHT, SQUARED_WEIGHT) == (1.0, 1.0, 3.0)
    assert LossOptions() == LossOptions(
        vae_weight=0.3, outcome_weight=1.0, pos_weight=1.0, beta=0.1, beta_warmup_steps=5000, free_bits=0.1
    )


@pytest.mark.parametrize(
    ("objective", "vae", "outcome"), [("joint", 0.25, 2.0), ("supervised", 0.0, 2.0), ("pretrain", 1.0, 0.0)]
)
def test_the_objective_decides_the_weights(objective: Objective, vae: float, outcome: float) -> None:
    options = LossOptions(objective=objective, vae_weight=0.25, outcome_weight=2.0)
    assert (options.effective_vae_weight, options.effective_outcome_weight) == (vae, outcome)
    assert (options.learns_sets, options.learns_outcome) == (vae > 0, outcome > 0)


def test_beta_rises_once_or_in_cycles() -> None:
    once = LossOptions(beta=1.0, beta_warmup_steps=2)
    again = LossOptions(beta=1.0, beta_warmup_steps=2, beta_schedule="cyclical")
    assert [beta_at(once, step) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert [beta_at(again, step) for step in range(6)] == [0.5, 1, 1, 1, 0.5, 1]


def test_a_part_that_was_not_computed_is_nothing() -> None:
    """The total is that of the other part; without either it is 0."""
    model, batch = tiny_model(), random_batch([[3, 1], [2]])
    prepared, counts = PreparedBatch.build(batch, seed=0), counts_of(batch)
    whole = compute_losses(model(prepared), batch.label, LossOptions(), counts, beta=0.1)
    for reconstruct, classify in ((True, False), (False, True), (False, False)):
        output = model(prepared, reconstruct=reconstruct, classify=classify)
        assert (output.decoded is None, output.logits is None) == (not reconstruct, not classify)
        found = compute_losses(output, batch.label, LossOptions(), counts, beta=0.1)
        vae = 0.3 * (whole.reconstruction + 0.1 * whole.kl)
        torch.testing.assert_close(found.total, reconstruct * vae + classify * whole.outcome)
        assert torch.equal(found.reconstruction, reconstruct * whole.reconstruction)
        assert torch.equal(found.kl, reconstruct * whole.kl)
        assert torch.equal(found.outcome, classify * whole.outcome)


def test_gradient_at_a_zero_vector_is_finite() -> None:
    """In the product form an event at the mean is the zero vector."""
    layout = SetLayout.build(torch.tensor([0, 2]))
    output = torch.zeros(2, 3, requires_grad=True)
    sum(chamfer_sums(torch.zeros(2, 3), output, layout)).backward()
    assert torch.isfinite(output.grad).all()


def test_kl_by_hand() -> None:
    posterior = Posterior(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, math.log(4.0)]]))
    expected = [2.0, 0.0, 0.5 * (4 - 1 - math.log(4))]
    torch.testing.assert_close(kl_per_dimension(posterior), torch.tensor([expected]))
    assert kl_sum(posterior, 0.0, torch.tensor([1])).item() == pytest.approx(sum(expected))
    assert kl_sum(posterior, 0.1, torch.tensor([1])).item() == pytest.approx(expected[0] + 0.1 + expected[2])


def test_cross_entropy_skips_the_unlabelled() -> None:
    logits = torch.tensor([[0.0, 0.0], [5.0, -5.0], [1.0, 3.0]])
    found = cross_entropy_sum(logits, torch.tensor([1, -1, 0])).item()
    assert found == pytest.approx(math.log(2) + math.log(1 + math.exp(2)))
    assert cross_entropy_sum(logits, torch.tensor([-1, -1, -1])).item() == 0.0


def test_positives_are_weighted() -> None:
    """Equal logits: each patient ln 2, the one with the outcome three times that, the unlabelled nothing."""
    found = cross_entropy_sum(torch.zeros(3, 2), torch.tensor([1, -1, 0]), torch.tensor([1.0, 3.0]))
    assert found.item() == pytest.approx(4 * math.log(2))


def test_soft_labels_by_hand() -> None:
    """Odds of 1 to 3: a label of 1/4 costs the entropy of its own share, one that is whole what a class costs."""
    logits = torch.log(torch.tensor([3.0, 1.0])).expand(4, 2, 2).clone().requires_grad_()
    soft, whole = torch.tensor([0.25, 0.0, 1.0, math.nan]), torch.tensor([-1, 0, 1, -1])
    share = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    hard = outcome_sum(Outcome(), logits, whole, LossOptions()).item()
    assert hard == pytest.approx(math.log(4 / 3) + math.log(4))
    found = outcome_sum(Outcome(), logits, soft, LossOptions())
    assert found.item() == pytest.approx(share + hard)
    found.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[[0, 3]], torch.zeros(2, 2, 2))
    weighted = outcome_sum(Outcome(), logits, soft, LossOptions(pos_weight=2.0)).item()
    assert weighted == pytest.approx(share + hard - 0.25 * math.log(0.25) + math.log(4))


def test_a_regression_by_hand() -> None:
    """Mean 10, std 2: labels 12 and 8 are 1 and -1; two heads, of which the second is half a unit off each time."""
    outcome = Outcome(name="los", kind="regression", classes=(), prior=(10.0,), std=2.0)
    logits = torch.tensor([[[1.0], [1.5]], [[-1.0], [-1.5]], [[7.0], [7.0]]], requires_grad=True)
    label = torch.tensor([12.0, 8.0, math.nan])
    found = outcome_sum(outcome, logits, label, LossOptions())
    assert found.item() == pytest.approx((0.5 * 0.25 + 0.5 * 0.25) / 2)
    found.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[2], torch.zeros(2, 1))
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(outcome.predict(logits)[:2, 0], torch.tensor([12.5, 7.5]))


def test_classes_by_hand() -> None:
    """Equal logits of three classes: ln 3 for each labelled patient, whether labels are integers or floats."""
    outcome = Outcome(name="ward", kind="multiclass", classes=("a", "b", "c"), prior=(0.5, 0.5, 0.0))
    logits, options = torch.zeros(3, 2, 3), LossOptions()
    integers, floats = torch.tensor([2, -1, 0]), torch.tensor([2.0, math.nan, 0.0])
    assert outcome_sum(outcome, logits, integers, options).item() == pytest.approx(2 * math.log(3))
    assert outcome_sum(outcome, logits, floats, options).item() == pytest.approx(2 * math.log(3))


@pytest.mark.parametrize(
    ("kind", "prior", "pos_weight", "how", "expected"),
    [
        ("binary", (0.9, 0.1), 1.0, "equal", None),
        ("binary", (0.9, 0.1), 3.0, "equal", [1.0, 3.0]),
        ("binary", (0.8, 0.2), 1.0, "balanced", [0.625, 2.5]),
        ("binary", (), 1.0, "balanced", None),
        ("multiclass", (0.5, 0.25, 0.25, 0.0), 3.0, "balanced", [2 / 3, 4 / 3, 4 / 3, 0.0]),
    ],
)
def test_weights_of_classes(
    kind: Kind, prior: tuple[float, ...], pos_weight: float, how: ClassWeights, expected: list[float] | None
) -> None:
    names = tuple("abcd"[: len(prior) or 2])
    found = class_weights(Outcome(kind=kind, classes=names, prior=prior), pos_weight, how, torch.device("cpu"))
    assert (None if found is None else found.tolist()) == (expected and pytest.approx(expected))


def test_the_losses_of_tasks_are_weighed_and_each_is_divided_by_its_own_labels() -> None:
    """Three tasks at once give what each gives alone, with ensembles of the same weights."""
    outcomes = (
        Outcome(name="death"),
        Outcome(name="los", kind="regression", classes=(), prior=(3.0,), std=2.0),
        Outcome(name="ward", kind="multiclass", classes=("a", "b", "c")),
    )
    model = tiny_model(outcomes=outcomes).eval()
    batch = random_batch([[2, 1], [3], [1, 4], [2]])
    columns = [[1.0, 0.0, math.nan, 1.0], [2.5, math.nan, math.nan, 7.0], [2.0, 0.0, 1.0, math.nan]]
    joint = dataclasses.replace(batch, label=torch.tensor(columns).T)
    options = LossOptions(task_weights=(1.0, 0.5, 2.0), outcome_weight=3.0, objective="supervised")
    output = model(joint, reconstruct=False)
    assert [tuple(logits.shape) for logits in output.logits] == [(4, 8, 2), (4, 8, 1), (4, 8, 3)]
    found = compute_losses(output, joint.label, options, counts_of(joint), beta=0.0)
    alone = []
    for number, outcome in enumerate(outcomes):
        single = tiny_model(outcomes=(outcome,)).eval()
        weights = {name: w for name, w in model.state_dict().items() if not name.startswith("head.ensembles.")}
        own = f"head.ensembles.{number}."
        weights |= {
            name.replace(own, "head.ensembles.0."): w for name, w in model.state_dict().items() if name.startswith(own)
        }
        single.load_state_dict(weights)
        label = joint.label[:, number]
        if outcome.kind != "regression":
            label = label.nan_to_num(-1).long()
        part = dataclasses.replace(batch, label=label)
        output = single(part, reconstruct=False)
        alone.append(compute_losses(output, label, LossOptions(), counts_of(part), beta=0.0).outcome)
    torch.testing.assert_close(found.tasks, torch.stack(alone))
    expected = alone[0] + 0.5 * alone[1] + 2 * alone[2]
    torch.testing.assert_close(found.outcome, expected)
    torch.testing.assert_close(found.total, 3 * expected)


def test_answers_after_the_first_hours_are_weighed_by_hand() -> None:
    """The loss is that at the end and half the mean of those after 12, 24 and 36 hours, each of a separate window; the
    outcome's own loss stays that at the end.
    """
    batch, model = random_batch([[3, 1, 2, 4], [2], [1, 5, 3]], labels=[1, 0, -1]), tiny_model().eval()
    options, counts = LossOptions(objective="supervised", prefix_weight=0.5), counts_of(batch)
    prefixes = Prefixes.after_hours(batch, options.prefix_hours)
    found = compute_losses(
        model(PreparedBatch.build(batch, prefixes=prefixes), reconstruct=False), batch.label, options, counts, beta=0.0
    )
    views = [batch, *(first_hours(batch, hours) for hours in (12, 24, 36))]
    end, *early = (
        compute_losses(model(view, reconstruct=False), batch.label, LossOptions(), counts, beta=0.0).outcome
        for view in views
    )
    torch.testing.assert_close(found.total, end + 0.5 * sum(early) / 3)
    torch.testing.assert_close(found.outcome, end)
    torch.testing.assert_close(found.tasks, end[None])
    assert LossOptions(objective="pretrain", prefix_weight=0.5).prefix_hours == ()
    assert LossOptions().prefix_hours == ()
