"""Which patients each model of cross-fitting learns from and answers for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.manifest import Manifest
from tests.training.runs import write_tiny_data
from training.data import DataSet, agree_on_data
from training.folds import Member, deal_patients, final_members, fold_members, label_strata, select_patients
from training.options import CrossFitOptions, DataOptions, RunOptions, TrainOptions
from training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    options = DataOptions(data_dir=str(write_tiny_data(tmp_path_factory.mktemp("data"))), batch_size=5)
    manifest = Manifest.load(options.open_folder())
    return agree_on_data(options, manifest, ALONE, "default", *manifest.splits)


def options_with(folds: int, repeats: int = 1, final_seeds: int = 1, seed: int = 0) -> TrainOptions:
    return TrainOptions(
        data=DataOptions(data_dir="data"),
        run=RunOptions(output_dir="run", seed=seed),
        cross_fit=CrossFitOptions(folds=folds, repeats=repeats, final_seeds=final_seeds),
    )


def ids_of(data: DataSet, split: str) -> list[str]:
    loader = data.open_loader(split, world=ALONE, seed=0, shuffle=False)
    found = [patient for batch in loader for patient in batch.patient_id]
    assert len(found) == len(set(found)) == data.num_samples[split]
    return found


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(2, 7), st.integers(0, 9))
def test_folds_differ_by_at_most_one_in_all_and_in_each_stratum(strata: list[int], folds: int, seed: int) -> None:
    stratum = np.array(strata, np.int64)
    fold = deal_patients(stratum, folds, seed=seed)
    assert np.array_equal(fold, deal_patients(stratum, folds, seed=seed))
    for chosen in (np.ones(len(stratum), bool), *(stratum == number for number in set(strata))):
        sizes = np.bincount(fold[chosen], minlength=folds)
        assert sizes.max() - sizes.min() <= 1


def test_every_patient_of_train_and_valid_is_answered_for_once_a_deal_and_never_learned_from(data: DataSet) -> None:
    everyone = sorted(ids_of(data, "train") + ids_of(data, "valid"))
    test, deals = ids_of(data, "test"), []
    for repeat in range(2):
        answered = []
        for member in fold_members(options_with(3, repeats=2))[3 * repeat : 3 * repeat + 3]:
            part = select_patients(data, member, options_with(3, repeats=2))
            learned, predicted = ids_of(part, "train"), ids_of(part, "valid")
            assert sorted(learned + predicted) == everyone
            assert ids_of(part, "test") == test
            answered.append(predicted)
        assert sorted(patient for fold in answered for patient in fold) == everyone
        deals.append(answered)
    assert deals[0] != deals[1]


def test_a_final_model_learns_from_all_and_answers_for_nobody(data: DataSet) -> None:
    member = final_members(options_with(3))[0]
    part = select_patients(data, member, options_with(3))
    assert sorted(ids_of(part, "train")) == sorted(ids_of(data, "train") + ids_of(data, "valid"))
    assert ids_of(part, "valid") == []
    assert part.num_samples["valid"] == 0


def test_strata_are_of_labels(data: DataSet) -> None:
    stratum = label_strata(data)
    labels = {}
    for split in ("train", "valid"):
        for batch in data.open_loader(split, world=ALONE, seed=0, shuffle=False):
            labels |= dict(zip(batch.patient_id, batch.label.tolist(), strict=True))
    assert (
        np.unique(stratum, return_counts=True)[1].tolist()
        == np.unique([*labels.values()], return_counts=True)[1].tolist()
    )


def test_members_are_named_and_seeded() -> None:
    options = options_with(2, repeats=2, final_seeds=2, seed=5)
    assert fold_members(options) == [
        Member(name="repeat_0_fold_0", seed=5, repeat=0, fold=0),
        Member(name="repeat_0_fold_1", seed=5, repeat=0, fold=1),
        Member(name="repeat_1_fold_0", seed=6, repeat=1, fold=0),
        Member(name="repeat_1_fold_1", seed=6, repeat=1, fold=1),
    ]
    assert final_members(options) == [Member(name="final_5", seed=5), Member(name="final_6", seed=6)]
    own = final_members(options)[1].options_of(options, stop_after=3)
    assert (Path(own.run.output_dir), own.run.seed) == (Path("run/members/final_6"), 6)
    assert own.optimisation.num_epochs == 3


def test_the_loader_of_other_patients_is_not_resumed(data: DataSet) -> None:
    first, second = (select_patients(data, member, options_with(3)) for member in fold_members(options_with(3))[:2])
    state = first.open_loader("train", world=ALONE, seed=0, shuffle=True).state_dict()
    with pytest.raises(Exception, match="patients was"):
        second.open_loader("train", world=ALONE, seed=0, shuffle=True).load_state_dict(state)
