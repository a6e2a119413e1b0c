"""The exported program: it predicts what the model does, whatever the number of patients, sets and events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model import program
from model.config import Outcome
from model.program import DenseModel, to_rectangles
from model.seqsetvae import SeqSetVAE
from tests.model.helpers import random_batch, tiny_model
from tests.model.test_saved import write

SIZES: tuple[Sequence[Sequence[int]], ...] = (
    [[1]],
    [[1], [1], [1]],
    [[2, 3], [1]],
    [[3, 1, 2], [4], [1, 1, 5, 2]],
    [[8, 1, 1, 1, 1, 2, 3], *[[1, 2]] * 9],
)
BATCHES = [random_batch(sizes, seed=number) for number, sizes in enumerate(SIZES)]
BOTH = (Outcome(name="a", calibration=(1.5, 0.25, -0.25)), Outcome(name="b", kind="regression", classes=(), std=3.0))


def check(model: SeqSetVAE, dense: torch.nn.Module) -> None:
    with torch.no_grad():
        for batch in BATCHES:
            expected, found = model(batch, reconstruct=False).predictions, dense(*to_rectangles(batch))
            for left, right in zip(expected, found, strict=True):
                assert left.shape == right.shape
                assert (left - right).abs().max() < 1e-6


@pytest.mark.parametrize(
    "changes",
    [{"event_form": "product"}, {"variable_axis": False}, {"without": "summary_features"}, {"without": "contexts"}, {}],
)
def test_rectangles_predict_as_ragged_batches_do(changes: dict[str, str | bool]) -> None:
    model = tiny_model(outcomes=BOTH, **changes).eval()
    check(model, DenseModel(model).eval())


def test_codes_that_share_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.codes.MAX_OWN_CODES", 4)
    model = tiny_model().eval()
    assert model.head.factors is not None
    check(model, DenseModel(model).eval())


def test_padding_says_nothing() -> None:
    """More columns and slots, and whatever stands in them, change no answer."""
    model = tiny_model().eval()
    code, value, has_value, minute = to_rectangles(BATCHES[3])
    with torch.no_grad():
        (expected,) = DenseModel(model)(code, value, has_value, minute)
        grown = [torch.nn.functional.pad(each, (0, 3, 0, 2), value=of) for each, of in ((code, 0), (value, 9.0))]
        known = torch.nn.functional.pad(has_value, (0, 3, 0, 2), value=True)
        (found,) = DenseModel(model)(*grown, known, torch.nn.functional.pad(minute, (0, 2), value=1e6))
    assert (expected - found).abs().max() < 1e-6


def test_the_program_of_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(levels=1, layers=1, outcomes=BOTH).eval()
    folder = write(tmp_path / "model", model)
    assert program.main([str(folder)]) == 0
    assert "program.pt2: written by PyTorch" in capsys.readouterr().out
    check(model, torch.export.load(folder / "program.pt2").module())
    assert program.main([str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    assert program.main([]) == 2
