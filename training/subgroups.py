"""Quality by subgroup of patients: by what a static variable, such as sex, age or unit, says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.config import Outcome
from pipeline.arrays import is_labelled
from pipeline.loading.batch import PatientBatch
from pipeline.schema import UserError
from training.quality import evaluate_predictions

MAX_VALUES = 8
"""Different values up to which each is a group of its own; of more, ranges of equal mass are."""

RANGES = 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Grouping:
    """A variable by which patients are grouped, and the ``edges`` of its ranges; without any they are found."""

    variable: str
    edges: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Grouping:
        """Return the grouping that ``Age=40,65,80`` or ``Gender`` names; ValueError for anything else."""
        variable, _, numbers = text.partition("=")
        edges = tuple(float(number) for number in numbers.split(",")) if numbers else ()
        if not variable or list(edges) != sorted(set(edges)):
            raise ValueError(f"{text!r}: name a variable, or one with rising edges, as Age=40,65,80")
        return cls(variable, edges)


def group_patients(
    batches: Iterable[PatientBatch], groupings: Sequence[Grouping], vocabulary: pa.Table
) -> dict[str, dict[str, str]]:
    """Return, by variable, the group of each patient who has one, by id.

    ``vocabulary`` has a row a code.  The first event of the variable decides.  A variable ``NAME`` that has categories,
    kept as variables ``NAME=category``, has a group for each; one with numbers has a group a value or a range.

    Raises:
        UserError: the data have no such variable.
    """
    codes, names = {}, vocabulary["variable"].to_pylist()
    mean, std = vocabulary["mean"].to_numpy(), vocabulary["std"].to_numpy()
    for grouping in groupings:
        prefix = f"{grouping.variable}="
        own = [n for n, name in enumerate(names) if name == grouping.variable or name.startswith(prefix)]
        if not own:
            raise UserError(f"--subgroups {grouping.variable}: the data have no such variable; see vocabulary.parquet")
        codes[grouping.variable] = np.array(own)
    found: dict[str, dict[str, tuple[int, float]]] = {grouping.variable: {} for grouping in groupings}
    for batch in batches:
        code, patient = batch.code.numpy(), batch.patient_of_set.numpy()[batch.set_of_event.numpy()]
        value = np.where(batch.has_value.numpy(), batch.value.double().numpy(), np.nan)
        for variable, wanted in codes.items():
            events = np.flatnonzero(np.isin(code, wanted))
            who, first = np.unique(patient[events], return_index=True)
            for b, event in zip(who, events[first], strict=True):
                number = code[event]
                raw = value[event] * std[number] + mean[number]
                found[variable].setdefault(batch.patient_id[b], (int(number), float(raw)))
    return {each.variable: _name_groups(each, found[each.variable], names) for each in groupings}


def _name_groups(grouping: Grouping, first: Mapping[str, tuple[int, float]], names: Sequence[str]) -> dict[str, str]:
    """Return the name of each patient's group from the variable and the value of the first event."""
    categories = {who: names[n].partition("=")[2] for who, (n, _) in first.items() if names[n] != grouping.variable}
    numbers = {who: raw for who, (_, raw) in first.items() if who not in categories and np.isfinite(raw)}
    values = np.unique(np.round([*numbers.values()], 6))
    if not grouping.edges and len(values) <= MAX_VALUES:
        return categories | {who: f"{round(raw, 6) + 0.0:g}" for who, raw in numbers.items()}  # no -0
    edges = grouping.edges or tuple(np.quantile([*numbers.values()], np.linspace(0, 1, RANGES + 1)[1:-1]).tolist())
    bounds = ["", *(f"{edge:.4g}" for edge in edges), ""]
    ranges = [_name_range(low, high) for low, high in pairwise(bounds)]
    return categories | {who: ranges[int(np.searchsorted(edges, raw, side="right"))] for who, raw in numbers.items()}


def _name_range(low: str, high: str) -> str:
    if low and high:
        return f"{low} to {high}"
    return f"below {high}" if high else f"from {low}"


def evaluate_subgroups(
    groups: Mapping[str, Mapping[str, str]],
    patient_id: Sequence[str],
    label: npt.NDArray[Any],
    prediction: npt.NDArray[Any],
    outcome: Outcome,
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each group of each variable, as :func:`evaluate_predictions` gives them.

    Of a binary outcome ``observed_over_expected`` stands beside them: positive samples over the sum of what was
    predicted.  Patients of no group are in ``not recorded``.
    """
    result: dict[str, dict[str, Any]] = {}
    for variable, group_of in groups.items():
        names = np.array([group_of.get(who, "not recorded") for who in patient_id])
        result[variable] = {}
        for name in sorted(set(names.tolist())):
            own = names == name
            ids = [who for who, inside in zip(patient_id, own, strict=True) if inside]
            metrics = evaluate_predictions(label[own], prediction[own], outcome, patient_id=ids)
            if outcome.kind == "binary":
                expected = float(prediction[own][is_labelled(label[own])].sum())
                metrics["observed_over_expected"] = metrics["num_positive"] / expected if expected else None
            result[variable][name] = metrics
    return result
