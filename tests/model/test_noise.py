from __future__ import annotations

import torch

from model.noise import Noise, PatientNoise

IDS = [f"patient {i}" for i in range(50)]


def noise(ids: list[str], seed: int = 0, step: int = 0, sets: int = 40) -> Noise:
    patients = PatientNoise.for_step(ids, seed=seed, step=step)
    return patients.for_rows(torch.arange(len(ids)).repeat_interleave(sets), torch.arange(sets).repeat(len(ids)))


def test_first_output_of_splitmix64() -> None:
    """The generator seeded with 0 gives 0xE220A8397B1DCDAF first: the finaliser of its increment."""
    from model import noise as module

    increment = torch.tensor([module._signed(module._GOLDEN)])
    assert module._mix(increment).item() == module._signed(0xE220A8397B1DCDAF)


def test_a_row_has_its_noise_wherever_it_stands() -> None:
    whole, some = noise(IDS).normal(0, 8), noise(IDS[7:9]).normal(0, 8)
    assert torch.equal(whole[7 * 40 : 9 * 40], some)


def test_seed_step_salt_and_position_all_matter() -> None:
    samples = [
        noise(IDS).normal(0, 8),
        noise(IDS, seed=1).normal(0, 8),
        noise(IDS, step=1).normal(0, 8),
        noise(IDS).normal(1, 8),
        noise(IDS).normal(0, 8).roll(1, 0),
        noise(IDS).normal(0, 8).roll(1, 1),
    ]
    correlations = torch.corrcoef(torch.stack([sample.flatten() for sample in samples]))
    assert (correlations - torch.eye(len(samples))).abs().max() < 0.04  # 16,000 draws: five standard errors


def test_normal_is_normal() -> None:
    sample = noise(IDS, sets=400).normal(0, 16).double()
    assert abs(sample.mean()) < 0.01
    assert abs(sample.var() - 1) < 0.01
    assert abs((sample**3).mean()) < 0.05
    assert abs((sample**4).mean() - 3) < 0.1
    assert sample.abs().max() < 6.5
    assert torch.isfinite(sample).all()


def test_dropout_keeps_the_mean_and_its_probability() -> None:
    rows = torch.ones(50 * 400, 16)
    dropped = noise(IDS, sets=400).dropout(rows, 3, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((dropped == 0).double().mean() - 0.25) < 0.005
    assert noise(IDS).dropout(rows, 3, 0.0) is rows
