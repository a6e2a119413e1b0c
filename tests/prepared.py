"""What preprocess must make of event rows, as naive as it can be, and what it did make, read with no code of ours."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.prepare.rules import Range, Rules
from pipeline.prepare.splits import SplitRule
from pipeline.schema import SPLITS

Row = tuple[str | None, float | None, str | None, float | None]
"""patient, minute, variable, value."""

Event = tuple[str, float | None, float | None]
"""variable, value, minute."""

Stay = dict[float, list[Event]]
"""Events by minute without its fraction; static ones under minus infinity."""

StoredPatient = tuple[str, int | None, list[tuple[float | None, list[tuple[int, float | None]]]]]
"""patient, label, and sets of (minute, events), an event being (code, scaled value)."""


def assign_splits(rule: SplitRule, patient_ids: Sequence[str]) -> npt.NDArray[np.int8]:
    """Return [P] the position of each patient's split in ``SPLITS``, where the input gives none."""
    return rule.split_by(rule.hash_patients(patient_ids)[1])


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The content of a data directory: patients of each split in stored order, and what is counted."""

    patients: dict[str, list[StoredPatient]]
    vocabulary: list[tuple[str, int, float, float]]
    rejects: Counter[str]


def read_prepared(directory: Path) -> Prepared:
    """What lies in ``directory``; a split's shards one after the other, with labels of the task ``default``."""
    task = directory / "tasks" / "default.parquet"
    rows = pq.ParquetFile(task).read().to_pylist() if task.exists() else []
    rows = [row for row in rows if row["prediction_time"] is row["prediction_minute"] is None]
    labels = {row["patient_id"]: row["label"] for row in rows}
    manifest = json.loads((directory / "manifest.json").read_text())
    patients: dict[str, list[StoredPatient]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for entry in manifest["splits"][split]:
            for row in pq.ParquetFile(directory / entry["path"]).read().to_pylist():
                events = list(zip(row["code"], row["value"], strict=True))
                ends = np.cumsum(row["set_size"]).tolist()
                assert ends[-1] == row["num_events"] == len(events)
                assert len(ends) == row["num_sets"]
                sets = [
                    (minute, events[start:end])
                    for minute, start, end in zip(row["minute"], [0, *ends], ends, strict=False)
                ]
                patients[split].append((row["patient_id"], labels.get(row["patient_id"]), sets))
    vocabulary = pq.ParquetFile(directory / "vocabulary.parquet").read().to_pylist()
    rejects = pq.ParquetFile(directory / "rejects.parquet").read()
    return Prepared(
        patients=patients,
        vocabulary=[(row["variable"], row["count"], row["mean"], row["std"]) for row in vocabulary],
        rejects=Counter(rejects["reason"].to_pylist()),
    )


def expected(
    rows: Sequence[Row],
    rule: SplitRule,
    labels: dict[str, int | None],
    *,
    splits: dict[str, str] | None = None,
    static: bool = False,
    rules: Rules = Rules(),  # noqa: B008  # frozen
) -> Prepared:
    """The same from the rows, one by one; ``splits`` of patients that do not go by ``rule``; no minute = ``static``."""
    rejects: Counter[str] = Counter()
    seen: set[Any] = set()
    stays: dict[str, Stay] = defaultdict(lambda: defaultdict(list))
    for patient, minute, variable, value in rows:
        with np.errstate(over="ignore"):
            number = None if value is None or math.isnan(value) else float(np.float32(value))
        patient, variable = (name and name.strip() for name in (patient, variable))
        if not patient:
            rejects["no_patient"] += 1
        elif not variable:
            rejects["no_variable"] += 1
        elif not (static and minute is None) and (minute is None or not math.isfinite(minute)):
            rejects["bad_minute"] += 1
        elif number is not None and math.isinf(number):
            rejects["infinite_value"] += 1
        elif (number := _ranged(rules.ranges.get(variable), number)) == math.inf:
            rejects["out_of_range"] += 1
        elif (patient, minute, variable, number) in seen:
            rejects["duplicate"] += 1
        else:
            seen.add((patient, minute, variable, number))
            stays[patient][-math.inf if minute is None else math.floor(minute)].append((variable, number, minute))

    split_of = {patient: (splits or {}).get(patient, SPLITS[assign_splits(rule, [patient])[0]]) for patient in stays}
    train = [stay for patient, stay in stays.items() if split_of[patient] == "train"]
    limited = _limit_outliers(stays, train, rules, rejects) if rules.outlier_std is not None else set()
    set_minute: dict[tuple[str, float], float | None] = {}
    for patient, stay in list(stays.items()):
        for key, events in list(stay.items()):
            set_minute[patient, key] = min((minute for *_, minute in events if minute is not None), default=None)
            stay[key] = _aggregated(events, rules.aggregate)
            rejects["aggregated"] += len(events) - len(stay[key])
            if not events:  # all of them outliers
                del stay[key]
        num_events = sum(map(len, stay.values()))
        if num_events < rules.min_events:
            rejects["short_patient"] += num_events
            del stays[patient]
    counts, values = _count([stay for patient, stay in stays.items() if split_of[patient] == "train"])
    vocabulary = [("<padding>", 0, 0.0, 1.0), ("<unknown>", 0, 0.0, 1.0)]
    for variable in sorted({variable for variable, count in counts.items() if count >= rules.min_count} | limited):
        numbers = np.array(values[variable] or [0.0])
        vocabulary.append((variable, counts[variable], numbers.mean(), numbers.std() or 1.0))
    code_of = {variable: code for code, (variable, *_) in enumerate(vocabulary)}

    patients: dict[str, list[StoredPatient]] = {split: [] for split in SPLITS}
    for patient, stay in stays.items():
        sets = []
        for key in sorted(stay):
            events = []
            for variable, number, event_minute in stay[key]:
                code = code_of.get(variable, 1)
                _, _, mean, std = vocabulary[code]
                scaled = None if number is None else (number - mean) / std
                at = event_minute or 0.0
                events.append((at, code, variable, math.inf if number is None else number, scaled))
            minute = set_minute[patient, key]
            sets.append(
                (minute, [(code, scaled) for _, code, _, _, scaled in sorted(events, key=lambda event: event[:4])])
            )
        patients[split_of[patient]].append((patient, labels.get(patient), sets))
    for stored in patients.values():
        stored.sort(key=lambda patient: (sum(len(events) for _, events in patient[2]), len(patient[2]), patient[0]))
    return Prepared(patients=patients, vocabulary=vocabulary, rejects=+rejects)


def _ranged(allowed: Range | None, number: float | None) -> float | None:
    """The number, clipped; infinite where it is rejected."""
    if allowed is None or number is None:
        return number
    low, high = float(np.float32(allowed.low)), float(np.float32(allowed.high))
    clipped = min(max(number, low), high)
    return clipped if clipped == number or allowed.action == "clip" else math.inf


def _count(stays: Sequence[Stay]) -> tuple[Counter[str], dict[str, list[float]]]:
    """Events of each variable, and their numbers."""
    counts: Counter[str] = Counter()
    values: dict[str, list[float]] = defaultdict(list)
    for variable, number, _ in (event for stay in stays for events in stay.values() for event in events):
        counts[variable] += 1
        values[variable] += [] if number is None else [number]
    return counts, values


def _limit_outliers(stays: dict[str, Stay], train: Sequence[Stay], rules: Rules, rejects: Counter[str]) -> set[str]:
    """The variables that have limits."""
    assert rules.outlier_std is not None
    counts, values = _count(train)
    frequent = [variable for variable, count in counts.items() if count >= rules.min_count and values[variable]]
    reach = {variable: rules.outlier_std * np.std(values[variable]) for variable in frequent}
    limits = {
        variable: (np.mean(values[variable]) - off, np.mean(values[variable]) + off)
        for variable, off in reach.items()
        if off > 0
    }
    for stay in stays.values():
        for key, events in stay.items():
            kept = []
            for variable, number, minute in events:
                low, high = limits.get(variable, (-math.inf, math.inf))
                if number is not None and not low <= number <= high:
                    if rules.outlier_action == "reject":
                        rejects["outlier"] += 1
                        continue
                    number = float(np.float32(min(max(number, low), high)))
                kept.append((variable, number, minute))
            stay[key] = kept
    return set(limits)


def _aggregated(events: list[Event], how: str) -> list[Event]:
    if how == "none":
        return events
    merged: list[Event] = []
    for variable in dict.fromkeys(name for name, *_ in events):
        same = [(number, minute) for name, number, minute in events if name == variable]
        numbers = [(minute or 0, number) for number, minute in same if number is not None]
        number = None
        if numbers:
            number = float(np.mean([value for _, value in numbers])) if how == "mean" else max(numbers)[1]
        minutes = [minute for _, minute in same if minute is not None]
        merged.append((variable, number, max(minutes) if minutes else None))
    return merged


def assert_same(prepared: Prepared, naive: Prepared) -> None:
    """Equal in everything but the last bits of means, stds and scaled values."""
    assert prepared.rejects == naive.rejects
    assert [row[:2] for row in prepared.vocabulary] == [row[:2] for row in naive.vocabulary]
    for mine, theirs in zip(prepared.vocabulary, naive.vocabulary, strict=True):
        np.testing.assert_allclose(mine[2:], theirs[2:], rtol=1e-9, atol=1e-9)
    for split in SPLITS:
        assert [patient[:2] for patient in prepared.patients[split]] == [
            patient[:2] for patient in naive.patients[split]
        ]
        for (*_, mine_sets), (*_, naive_sets) in zip(prepared.patients[split], naive.patients[split], strict=True):
            assert [minute for minute, _ in mine_sets] == [minute for minute, _ in naive_sets]
            for (_, mine), (_, theirs) in zip(mine_sets, naive_sets, strict=True):
                assert [code for code, _ in mine] == [code for code, _ in theirs]
                assert [value is None for _, value in mine] == [value is None for _, value in theirs]
                np.testing.assert_allclose(
                    [value for _, value in mine if value is not None],
                    [value for _, value in theirs if value is not None],
                    rtol=1e-5,
                    atol=1e-5,
                )
