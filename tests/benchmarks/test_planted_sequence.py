"""The stays of ``benchmarks.planted_sequence``: an effect across sets, and summaries that cannot see it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.planted_sequence import (
    DRAWN_SETS,
    EFFECT,
    OTHERS,
    PRESSURE,
    SETS,
    PlantedStays,
    draw_stays,
    events_of,
    true_probability,
)
from model.features import VariableLayout, summary_features
from pipeline.loading.batch import PatientBatch
from pipeline.schema import FIRST_CODE
from training.summaries import Summaries

VARIABLES = ["<padding>", "<unknown>", "Dose", "Pressure", *OTHERS]


@pytest.fixture(scope="module")
def stays() -> PlantedStays:
    return draw_stays(400, seed=1)


def exchange_doses(stays: PlantedStays) -> PlantedStays:
    """Return the stays with a dose, between the first and the last set, where there was none."""
    dose = stays.dose.copy()
    dose[:, 1:-1] = ~dose[:, 1:-1]
    return stays._replace(dose=dose)


def batch_of(stays: PlantedStays) -> PatientBatch:
    """Return the stays as a batch whose values are in raw units."""
    table = events_of(stays)
    stay, minute, name, value = (column.to_numpy() for column in table.columns)
    code = np.array([VARIABLES.index(each) for each in name])
    order = np.lexsort((code, minute, stay))
    _, set_size = np.unique(np.column_stack([stay, minute])[order], axis=0, return_counts=True)
    number = len(stays.label)
    return PatientBatch(
        code=torch.from_numpy(code[order]),
        value=torch.from_numpy(np.nan_to_num(value[order]).astype(np.float32)),
        has_value=torch.from_numpy(~np.isnan(value[order])),
        set_offsets=torch.from_numpy(np.concatenate([[0], set_size.cumsum()])),
        minute=torch.from_numpy(stays.minute.ravel().astype(np.float32)),
        patient_offsets=torch.arange(number + 1) * SETS,
        label=torch.from_numpy(stays.label),
        patient_id=[str(each) for each in range(number)],
    )


def summaries_of(batch: PatientBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the summaries [N, …] of each stay that the model computes, and those of the stack; NaN = none."""
    layout = VariableLayout.build(batch)
    features = summary_features(batch, layout)
    own = np.full((batch.num_patients, len(VARIABLES), features.shape[1]), np.nan)
    own[layout.patient, layout.code] = features
    number = len(VARIABLES)
    scale = {"count": np.ones(number), "mean": np.zeros(number), "std": np.ones(number)}
    vocabulary = pa.table({"variable": VARIABLES, **scale})
    return own[:, FIRST_CODE:].reshape(batch.num_patients, -1), Summaries(vocabulary).of_batch(batch)


def test_the_pressure_follows_the_dose_of_the_set_before_one_way_for_each_label(stays: PlantedStays) -> None:
    pressure, before = stays.values["Pressure"][:, 2:], stays.dose[:, 1:-1]
    assert (before.sum(1) == DRAWN_SETS // 2).all()
    after_dose, after_none = ((pressure * sets).sum(1) / sets.sum(1) for sets in (before, ~before))
    for label, sign in ((1, 1), (0, -1)):
        response = (after_dose - after_none)[stays.label == label].mean()
        assert response == pytest.approx(sign * 2 * EFFECT * PRESSURE[1], rel=0.1)
    assert roc_auc_score(stays.label, after_dose - after_none) > 0.99
    assert log_loss(stays.label, true_probability(stays)) < 0.1


def test_no_summary_of_a_stay_changes_when_its_doses_are_exchanged(stays: PlantedStays) -> None:
    few = PlantedStays(
        stays.minute[:20], stays.dose[:20], {n: v[:20] for n, v in stays.values.items()}, stays.label[:20]
    )
    batch, exchanged = batch_of(few), batch_of(exchange_doses(few))
    assert not torch.equal(batch.set_of_event, exchanged.set_of_event)
    for before, after in zip(summaries_of(batch), summaries_of(exchanged), strict=True):
        np.testing.assert_array_equal(before, after)
    assert true_probability(exchange_doses(few)) == pytest.approx(1 - true_probability(few))


def test_no_summary_tells_the_label(stays: PlantedStays) -> None:
    """The standard error of an AUROC of 400 stays is 0.03."""
    for summaries in summaries_of(batch_of(stays)):
        known = summaries[:, ~np.isnan(summaries).any(0)]
        assert known.shape[1] > 10
        for column in known.T:
            assert 0.4 < roc_auc_score(stays.label, column) < 0.6


def test_a_set_does_not_tell_by_itself(stays: PlantedStays) -> None:
    """A dose was before as often in sets with a dose as in those without, so these have the same pressure."""
    agree = (stays.dose[:, 2:-1] == stays.dose[:, 1:-2]).sum(1)
    numbers, times = np.unique(agree, return_counts=True)
    assert numbers.tolist() == [DRAWN_SETS // 2 - 1, DRAWN_SETS // 2]
    assert times.min() > 150
    pressure, dose = stays.values["Pressure"], stays.dose
    difference = (pressure * dose).sum(1) / dose.sum(1) - (pressure * ~dose).sum(1) / (~dose).sum(1)
    assert 0.4 < roc_auc_score(stays.label, difference) < 0.6
