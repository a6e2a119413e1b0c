from __future__ import annotations

from dataclasses import replace

import torch

from model.config import SeqSetVAEConfig
from model.features import NUM_FEATURES
from model.outcome import feature_moments
from model.prepared import PreparedBatch
from model.seqsetvae import SeqSetVAE
from tests.model import reference
from tests.model.helpers import NUM_CODES, random_batch, tiny_model


def test_moments_are_those_of_the_patients_that_have_the_variable() -> None:
    """Against the features of each patient, one by one; in two batches as in one."""
    batch = random_batch([[3, 4, 2], [5], [1, 6]])
    found = feature_moments(batch, NUM_CODES)
    head = tiny_model().head
    head.fit_features(found)
    courses = [reference.summary_features(batch, b) for b in range(3)]
    for code in range(NUM_CODES):
        rows = torch.tensor([course[code] for course in courses if code in course], dtype=torch.float64)
        assert found[0, code].tolist() == [len(rows)] * NUM_FEATURES
        if len(rows):
            torch.testing.assert_close(head.feature_mean[code].double(), rows.mean(0), atol=1e-5, rtol=1e-5)
            spread = rows.std(0, unbiased=False)
            expected = torch.where(spread > 1e-3, spread, 1.0)
            torch.testing.assert_close(head.feature_std[code].double(), expected, atol=1e-4, rtol=1e-4)
        else:
            assert not head.feature_mean[code].any()
            assert (head.feature_std[code] == 1).all()


def test_the_head_sees_features_as_z_scores_four_at_most() -> None:
    """With moments that move all features, and some beyond the bound, the head agrees with the loops."""
    batch, model = random_batch([[3, 4, 2], [5], [1, 6]]), tiny_model().eval()
    generator = torch.Generator().manual_seed(0)
    model.head.feature_mean.copy_(torch.randn(NUM_CODES, NUM_FEATURES, generator=generator))
    model.head.feature_std.copy_(torch.rand(NUM_CODES, NUM_FEATURES, generator=generator) + 0.05)
    torch.nn.init.normal_(model.head.ensembles[0].summary_bias)
    with torch.no_grad():
        found = model(batch).logits[0]
        expected = torch.stack([reference.patient(model, batch, b).logits for b in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_large_vocabulary_has_an_embedding_a_code_and_no_more() -> None:
    """Of what is learned; moments of summary features are a row a code too."""
    few, many = (SeqSetVAE(SeqSetVAEConfig.preset("small", num_codes=number)) for number in (1_000, 30_000))
    grown = {
        name: of_many.numel() - of_few.numel()
        for (name, of_few), of_many in zip(few.named_parameters(), many.parameters(), strict=True)
        if of_few.shape != of_many.shape
    }
    assert grown == {"events.embedding": 29_000 * 64}


def test_without_summary_features_the_head_does_not_see_them() -> None:
    prepared = PreparedBatch.build(random_batch([[3, 1], [5], [2, 2]]))
    other = replace(prepared, features=prepared.features + 1)
    for without, same in (("summary_features", True), ("nothing", False)):
        model = tiny_model(without=without).eval()
        logits = [model(each).logits[0] for each in (prepared, other)]
        assert torch.equal(*logits) is same


def test_without_contexts_the_head_learns_nothing_from_the_transformer() -> None:
    prepared = PreparedBatch.build(random_batch([[3, 1], [5], [2, 2]]))
    for without in ("contexts", "nothing"):
        model = tiny_model(without=without).eval()
        model(prepared, reconstruct=False).logits[0].sum().backward()
        gradients = [parameter.grad for parameter in model.transformer.parameters()]
        reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert any(reached) is (without == "nothing")
