from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from tests.training.runs import write_tiny_data
from training.data import DataOptions, DataSet, sample_patients
from training.parallel import World
from training.validation import rank_validations


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = write_tiny_data(tmp_path_factory.mktemp("data"))
    options = DataOptions(data_dir=str(folder))
    opened = options.open_folder()
    return DataSet(options=options, folder=opened, manifest=Manifest.load(opened), tasks=(), quarantined={})


def patients_of(data: DataSet, split: str) -> list[str]:
    loader = data.open_loader(split, world=World(0, 1, torch.device("cpu")), seed=0, shuffle=False)
    return [patient for batch in loader for patient in batch.patient_id]


def test_smaller_samples_of_patients_are_part_of_larger_ones(data: DataSet) -> None:
    everyone, train = set(patients_of(data, "valid")), patients_of(data, "train")
    before: set[str] = set()
    for number in (1, 4, 11, 12, 99):
        sampled = sample_patients(data, "valid", number)
        now = patients_of(sampled, "valid")
        assert len(now) == len(set(now)) == min(number, len(everyone)) == sampled.num_samples["valid"]
        assert before <= set(now) <= everyone
        before = set(now)
        assert patients_of(sampled, "train") == train, "other splits are whole"
    assert sample_patients(data, "valid", 0) is data


LOSS = st.sampled_from([0.5, 1.0, 2.0])


@given(st.lists(st.tuples(LOSS, st.none() | LOSS), max_size=6))
def test_the_first_of_ranked_validations_is_the_one_that_ran_best(found: list[tuple[float, float | None]]) -> None:
    """By AUROC where all have one; the last of equal ones stays behind, as a later one must be better to be best."""
    validations = [{"loss": loss, "auroc": auroc, "step": step} for step, (loss, auroc) in enumerate(found)]
    by_loss = rank_validations(validations, "loss")
    assert by_loss == sorted(validations, key=lambda each: (each["loss"], each["step"]))
    if all(auroc is not None for _, auroc in found):
        by_auroc = rank_validations(validations, "auroc")
        assert by_auroc == sorted(validations, key=lambda each: (-each["auroc"], each["step"]))
