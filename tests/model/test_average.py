"""Several models as one: the mean of what they say."""

from __future__ import annotations

import pytest
import torch

from model.average import AveragedModel
from tests.model.helpers import random_batch, tiny_model


def test_the_prediction_is_the_mean_and_the_latents_are_the_first_models() -> None:
    batch = random_batch([[3, 1], [5], [2, 2, 4]], seed=1)
    models = [tiny_model().eval() for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 0.1 * number)
    outputs = [model(batch) for model in models]
    averaged = AveragedModel(models)(batch)
    mean = torch.stack([output.probability for output in outputs]).mean(0)
    assert averaged.probability.tolist() == pytest.approx(mean.tolist(), abs=1e-6)
    assert torch.equal(averaged.posterior.mu, outputs[0].posterior.mu)
    assert torch.equal(averaged.decoded, outputs[0].decoded)
    assert AveragedModel(models)(batch, classify=False).logits is None
