from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.set_vae import Posterior
from tests.training.runs import read_metrics, read_summary, run, write_tiny_data
from training.collapse import CollapseGauges, is_collapsed
from training.parallel import World
from training.state import TrainState

ALONE = World(0, 1, torch.device("cpu"))


def fill(*posteriors: Posterior) -> CollapseGauges:
    gauges = CollapseGauges(posteriors[0].mu.shape[1], torch.device("cpu"))
    for posterior in posteriors:
        gauges.update(posterior, torch.tensor([len(posterior.mu)]))
    return gauges


def test_by_hand_and_over_batches() -> None:
    """Means 0 and 1 vary by 0.25, the constant 3 not at all however large it is, 0.1 and -0.1 by 0.01: not *above*
    it."""
    mu = torch.tensor([[0.0, 3.0, 0.0999], [1.0, 3.0, -0.0999]])
    logvar = torch.full((2, 3), math.log(0.5))
    together = fill(Posterior(mu, logvar)).read(ALONE)
    apart = fill(Posterior(mu[:1], logvar[:1]), Posterior(mu[1:], logvar[1:])).read(ALONE)
    assert together == apart
    assert together.active_units == 1
    assert together.mean_posterior_variance == pytest.approx(0.5)
    each = 0.5 * (0.5 - 1 + math.log(2))
    assert together.kl == pytest.approx(3 * each + 0.5 * (0.5 + 9 + 0.0999**2), rel=1e-5)


def test_a_posterior_equal_to_the_prior_is_collapsed_and_a_spread_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    flat, spread = torch.zeros(100, 50), torch.randn(100, 50, generator=generator)
    assert is_collapsed(fill(Posterior(flat, torch.zeros(100, 50))).read(ALONE), 0.02)
    assert not is_collapsed(fill(Posterior(spread, torch.full((100, 50), -2.0))).read(ALONE), 0.02)


def test_posterior_variance_alone_does_not_make_a_unit_active() -> None:
    assert fill(Posterior(torch.zeros(10, 4), torch.full((10, 4), -5.0))).read(ALONE).active_units == 0


def test_fillers_are_not_counted_and_reading_begins_anew() -> None:
    mu, logvar = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 3)
    gauges = fill(Posterior(mu[:4], logvar[:4]))
    gauges.update(Posterior(mu, logvar), torch.tensor([2]))
    assert gauges.read(ALONE) == fill(Posterior(torch.cat([mu[:4], mu[:2]]), torch.zeros(6, 3))).read(ALONE)
    assert not gauges.sums.any()


def test_several_ranks_are_counted_once_in_what_is_saved() -> None:
    """The first rank saves what all have seen; at a resume the others begin at 0."""
    seen = fill(Posterior(torch.ones(4, 2), torch.zeros(4, 2)))
    saved = {"sums": seen.sums.clone()}
    seen.combine(World(1, 1, torch.device("cpu")))
    assert not seen.sums.any()
    seen.load_state_dict(saved)
    assert torch.equal(seen.sums, saved["sums"])


def plant(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the posterior be the prior from a step on."""
    step = train.train_step

    def make(state: TrainState, *rest: Any) -> Any:
        if state.progress.step >= after:
            for model in (state.model, state.ema_model):
                for parameter in model.encoder.parameters():
                    parameter.data.zero_()
        return step(state, *rest)

    monkeypatch.setattr(train, "train_step", make)


@pytest.mark.parametrize("after", [7, 10, 14])
def test_a_planted_collapse_is_found_by_the_second_look_after_it(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A look every 5 steps finds it within 10; a look every 50, the default, within 100."""
    plant(monkeypatch, after)
    flags = ["--batch_size", "1", "--collapse_steps", "5", "--max_epochs", "1", "--event_dropout", "0"]
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "run"
    assert run(data, out, *flags, "--stop_on_collapse") == 0
    looks = [line for line in read_metrics(out) if line["kind"] == "posterior"]
    assert [look["collapsed"] for look in looks] == [False] * (len(looks) - 1) + [True]
    assert after < looks[-1]["step"] <= after + 10
    assert all(later["step"] - earlier["step"] == 5 for earlier, later in pairwise(looks))
    assert (out / "checkpoints" / "collapsed.pt").exists()
    assert f"collapsed at step {looks[-1]['step']}" in capsys.readouterr().err
    summary = read_summary(out)
    assert (summary["stopped_by"], summary["steps"]) == ("collapse", looks[-1]["step"])
    assert summary["best"]["step"] == summary["steps"], "what was stopped is validated once"
    assert run(data, out, *flags, "--resume") == 0, "whoever does not stop goes on"
    assert read_summary(out)["stopped_by"] == "max_epochs"
