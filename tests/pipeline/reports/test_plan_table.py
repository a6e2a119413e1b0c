from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.arrays import offsets_from_sizes
from pipeline.reports.plan_table import SplitLengths, main
from pipeline.sampling.plan import EpochPlan
from pipeline.sampling.quality import (
    label_correlation,
    neighbour_correlation,
    padding_waste,
    pairs_meeting_again,
    rank_imbalance,
)
from tests.data_dirs import Patient, in_stored_order


def plan_of(*batches: list[int]) -> EpochPlan:
    order = np.array([patient for batch in batches for patient in batch], dtype=np.int64)
    return EpochPlan(order=order, batch_offsets=offsets_from_sizes(np.array([len(batch) for batch in batches])))


def test_padding_waste_by_hand() -> None:
    # Rectangles 2 × 3 and 2 × 5, of which 1 + 3 and 5 + 5 cells are filled.
    assert padding_waste(plan_of([0, 1], [2, 3]), np.array([1, 3, 5, 5])) == pytest.approx(2 / 16)
    assert padding_waste(plan_of(), np.array([], dtype=np.int64)) == 0


def test_pairs_meeting_again_by_hand() -> None:
    plan = plan_of([0, 1, 2], [3, 4])  # pairs 01 02 12 34
    assert pairs_meeting_again(plan, plan) == 1
    assert pairs_meeting_again(plan, plan_of([3, 1, 2], [0, 4])) == pytest.approx(1 / 4)
    assert np.isnan(pairs_meeting_again(plan_of([0], [1]), plan_of([0, 1])))


def test_correlations_by_hand() -> None:
    num_events = np.array([1, 2, 3, 4])
    assert neighbour_correlation(plan_of([0], [1], [2], [3]), num_events) == pytest.approx(1)
    assert neighbour_correlation(plan_of([0], [3], [1], [2]), num_events) == pytest.approx(-0.9819805)
    assert np.isnan(neighbour_correlation(plan_of([0, 1], [2, 3]), num_events))
    label = np.array([0, 0, 1, -1])
    assert label_correlation(plan_of([1, 0], [3, 2]), num_events, label) == pytest.approx(1)
    assert np.isnan(label_correlation(plan_of([0, 1, 2, 3]), num_events, label))


def test_rank_imbalance_by_hand() -> None:
    cost = np.array([3.0, 1.0, 2.0, 2.0])
    # Step 0: 3 against 1 + 2; step 1: 2 against nothing.
    assert rank_imbalance(plan_of([0, 1, 2], [3]), cost, 2) == pytest.approx((0 + 2) / 2)
    assert rank_imbalance(plan_of(), cost, 2) == 0


def test_lengths_stand_in_the_order_of_the_shards(data_dir: Path, patients: list[Patient]) -> None:
    lengths = SplitLengths.read(data_dir, "train")
    stored = in_stored_order(patients)
    assert lengths.num_events.tolist() == [patient.num_events for patient in stored]
    assert lengths.num_sets.tolist() == [patient.num_sets for patient in stored]
    assert lengths.label.tolist() == [-1 if patient.label is None else patient.label for patient in stored]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_table_is_printed_for_any_split(data_dir: Path, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--split", split, "--max_events", "120", "--world_size", "3", "--max_sequence_length", "30"]
    assert main([str(data_dir), "--batch_size", "4", *flags]) == 0
    shown = capsys.readouterr().out
    for policy in ("at random", "bucketed", "120 events and 4 patients"):
        assert policy in " ".join(shown.split())
    assert ("53 patients" in shown) == (split == "train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "dev"], "no split 'dev'; it has test, train, valid"),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--max_events", "3"], "--max_events 3: a patient has"),
        (["--epochs", "1"], "--epochs 1: must be at least 2"),
        (["--world_size", "0"], "--world_size 0: must be at least 1"),
        (["--max_sequence_length", "0"], "--max_sequence_length 0: must be at least 1"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    data_dir: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(data_dir), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_command_of_the_handbook_runs(data_dir: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "pipeline.plan", str(data_dir), "--batch_size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert "bucketed" in done.stdout
    assert done.stderr == ""
