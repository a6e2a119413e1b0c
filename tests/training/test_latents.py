"""A look at latents, against loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.losses import kl_per_dimension
from model.prepared import PreparedBatch
from tests.model.helpers import NUM_CODES, random_batch, tiny_model
from tests.pages import Page, check_self_contained
from tests.training.runs import run, write_tiny_data
from training.latents import LatentSums, nearest_errors, project
from training.parallel import World

NAMES = [f"v{code}" for code in range(NUM_CODES)]


@torch.no_grad()
def test_errors_are_those_of_the_nearest_decoded_vector_of_the_set() -> None:
    batch, model = random_batch([[3, 11, 2], [9], [1, 17]], seed=1), tiny_model().eval()
    prepared = PreparedBatch.build(batch)
    output = model(prepared)
    found = nearest_errors(prepared, output)
    sets = prepared.sets
    for event in range(batch.num_events):
        slots = [r for r in range(len(sets.mask)) if sets.mask[r]]
        own = next(r for r in slots if sets.event_of_slot[r] == event)
        same = [r for r in slots if batch.set_of_event[sets.event_of_slot[r]] == batch.set_of_event[event]]
        expected = min(float((output.events[own] - output.decoded[r]).square().sum()) for r in same)
        assert float(found[event]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_sums_of_batches_are_those_of_all(tmp_path: Path) -> None:
    model, sums = tiny_model().eval(), LatentSums(16, NUM_CODES)
    batches = [random_batch([[3, 1], [4]], seed=1), random_batch([[2, 2, 5], [1]], seed=2)]
    rows, kl, errors = [], [], {}
    for batch in batches:
        prepared = PreparedBatch.build(batch)
        output = model(prepared)
        sums.add(prepared, output)
        rows += [output.posterior.mu[batch.patient_of_set == b].mean(0) for b in range(batch.num_patients)]
        kl.append(kl_per_dimension(output.posterior))
        for code, error in zip(batch.code.tolist(), nearest_errors(prepared, output).tolist(), strict=True):
            errors.setdefault(NAMES[code], []).append(error)
    sums.combine(World(0, 1, torch.device("cpu")))
    found = sums.summarize(NAMES)
    assert np.concatenate(sums.patient_BD) == pytest.approx(torch.stack(rows).numpy(), abs=1e-5)
    assert found["kl_by_dimension"] == pytest.approx(torch.cat(kl).mean(0).tolist(), rel=1e-4)
    by_variable = found["reconstruction_error_by_variable"]
    assert by_variable == pytest.approx({name: np.mean(each) for name, each in errors.items()}, rel=1e-4)
    assert [len(errors[name]) for name in by_variable] == sorted(map(len, errors.values()), reverse=True)


def test_principal_components_keep_distances_in_a_plane() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(30, 2)) @ np.linalg.qr(rng.normal(size=(5, 2)))[0].T + 3
    place = next(iter(project(plane).values()))
    distance = [np.linalg.norm(x[:, None] - x[None], axis=2) for x in (plane, place)]
    assert distance[0] == pytest.approx(distance[1], abs=1e-8)
    assert project(plane[:2]) == {}


@pytest.mark.usefixtures("drawn")
def test_the_page_of_a_checkpoint(tmp_path: Path) -> None:
    data, out = write_tiny_data(tmp_path / "data"), tmp_path / "evaluation"
    assert run(data, tmp_path / "run", "--max_epochs", "1") == 0
    assert run(data, out, "--evaluate", str(tmp_path / "run" / "checkpoints" / "best.pt"), "--export_latents") == 0
    check_self_contained(Page(out / "latents_test.html"))
    found = json.loads((out / "evaluation_test.json").read_text())
    assert len(found["kl_by_dimension"]) == 64
    assert found["reconstruction_error_by_variable"]
    assert pq.read_table(out / "latents_test.parquet").num_rows > 12
