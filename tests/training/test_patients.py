"""Pages of single patients: answers are those of prefixes, effects those of leaving a variable out."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from model.config import Outcome
from tests.model.helpers import NUM_CODES, first_hours, random_batch, tiny_model
from tests.pages import Page, check_self_contained
from tests.training.runs import run, write_tiny_data
from training import patients
from training.patients import describe_patient

NAMES = [f"v{code}" for code in range(NUM_CODES)]


@torch.no_grad()
def test_answers_are_those_of_the_events_so_far_and_effects_what_a_variable_changes() -> None:
    batch, model = random_batch([[3, 1, 2, 4]], seed=2), tiny_model().eval()
    found = describe_patient(model, batch, NAMES)
    answers = found["outcomes"]["default"]["answers"]
    for number, (hour, answer) in enumerate(answers):
        assert hour == pytest.approx(float(batch.minute[number]) / 60)
        keep = first_hours(batch, float(batch.minute[number] - batch.minute[0]) / 60 + 1e-4)
        assert answer == pytest.approx(float(model(keep).probability), abs=1e-6)
    effects = found["outcomes"]["default"]["effects"]
    assert effects.keys() == {NAMES[code] for code in batch.code.tolist()}
    for name, effect in effects.items():
        without = batch.keep_events(batch.code != NAMES.index(name))
        assert effect == pytest.approx(answers[-1][1] - float(model(without).probability), abs=1e-6)
    assert [abs(each) for each in effects.values()] == sorted(map(abs, effects.values()), reverse=True)
    assert torch.tensor(found["latent"]).shape == (4, 16)


def test_one_variable_one_set_and_many_sets() -> None:
    batch, model = random_batch([[1]]), tiny_model().eval()
    alone = describe_patient(model, batch, NAMES)
    assert alone["outcomes"]["default"]["effects"] == {}
    assert len(alone["outcomes"]["default"]["answers"]) == 1
    with mock.patch.object(patients, "MAX_ANSWERS", 3):
        many = describe_patient(model, random_batch([[1] * 9]), NAMES)
    assert len(many["outcomes"]["default"]["answers"]) == 3
    assert many["outcomes"]["default"]["answers"][-1][0] == many["hours"][-1]


@torch.no_grad()
def test_classes_and_numbers_have_answers_of_their_own() -> None:
    ward_of = Outcome(name="ward", kind="multiclass", classes=("a", "b", "c"))
    stay_of = Outcome(name="stay", kind="regression", classes=(), prior=(5.0,), std=2.0)
    batch, model = random_batch([[2, 3]]), tiny_model(outcomes=(ward_of, stay_of)).eval()
    found = describe_patient(model, batch, NAMES)["outcomes"]
    ward, stay = model(batch).predictions
    assert found["ward"]["answers"][-1][1] == pytest.approx(float(ward.max()), abs=1e-6)
    assert found["ward"]["of_class"] == "abc"[int(ward.argmax())]
    assert found["stay"]["answers"][-1][1] == pytest.approx(float(stay), abs=1e-5)
    assert found["stay"]["of_class"] is None


@pytest.mark.usefixtures("drawn")
def test_pages_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "evaluation"
    assert run(data, tmp_path / "run", "--max_epochs", "1") == 0
    flags = ["--evaluate", str(tmp_path / "run" / "checkpoints" / "best.pt"), "--patients"]
    assert run(data, out, *flags, "test5/ü", "test0/ü") == 0
    found = json.loads((out / "patients_test.json").read_text())
    assert [*found] == ["test5/ü", "test0/ü"]
    page = Page(out / "patients_test.html")
    check_self_contained(page)
    assert page.source.count("<figure>") == 2
    assert run(data, tmp_path / "none", *flags, "test0/ü", "train0/ü") == 2
    error = capsys.readouterr().err
    assert "--patients: 1 of 2 ids are of nobody in split test" in error
    assert "train0" not in error, "an id is a patient's"
