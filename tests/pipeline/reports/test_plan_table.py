from __future__ import annotations

import json
import shutil
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
from tests.data_dirs import Patient, add_task, in_stored_order


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
    lengths = SplitLengths.read(data_dir, "train", "default")
    assert set(SplitLengths.read(data_dir, "train").label.tolist()) == {-1}
    stored = in_stored_order(patients)
    assert lengths.num_events.tolist() == [patient.num_events for patient in stored]
    assert lengths.num_sets.tolist() == [patient.num_sets for patient in stored]
    assert lengths.label.tolist() == [-1 if patient.label is None else patient.label for patient in stored]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_table_is_printed_for_any_split(data_dir: Path, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--split", split, "--max_events", "120", "--world_size", "3", "--max_sequence_length", "30"]
    assert main([str(data_dir), "--batch_size", "4", *flags]) == 0
    shown = capsys.readouterr().out
    for policy in ("at random", "bucketed", "120 events"):
        assert policy in " ".join(shown.split())
    assert ("53 patients" in shown) == (split == "train")


def test_the_samples_of_a_task_are_planned(
    data_dir: Path, patients: list[Patient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    add_task(copy, [(patient, minute, 1) for patient in patients[:5] for minute in (4000.0, 5000.0)], "late")
    assert main([str(copy), "--task", "late", "--batch_size", "3"]) == 0
    assert "10 samples of task late" in capsys.readouterr().out
    assert main([str(copy), "--task", "early"]) == 2
    assert "has no task 'early'" in capsys.readouterr().err


def test_peak_memory_by_hand(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A patient takes 1 MiB and a batch 10; so 15 MiB hold five patients."""
    peak = {"event": 0, "set": 0, "set_squared": 0, "patient": 2**20, "batch": 10 * 2**20}
    model = tmp_path / "memory_model.json"
    model.write_text(json.dumps({"peak": peak, "step_bytes": 1, "batch_size": 16}))
    flags = ["--memory_model", str(model), "--max_memory", "15MiB", "--batch_size", "4"]
    assert main([str(data_dir), *flags]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[-2].strip() for row in rows] == ["14 MiB"] * 3 + ["15 MiB"]
    assert rows[-1][1].strip() == "15,728,640 bytes"
    assert rows[-1][2].strip() == "11"  # 53 patients, five at a time
    assert main([str(data_dir)]) == 0
    assert "MiB" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"peak": {"event": "much"}}', '{"peak": {"flops": 1}}', '{"peak": 1}']
)
def test_a_file_that_is_no_memory_model_is_refused(
    data_dir: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.json").write_text(content)
    assert main([str(data_dir), "--memory_model", str(tmp_path / "model.json")]) == 2
    message = capsys.readouterr().err
    assert "model.json" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "dev"], "no split 'dev'; it has test, train, valid"),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--batch_size", "many"], "argument --batch_size: invalid int value: 'many'; see --help"),
        (["--max_events", "3"], "--max_events 3: a patient has"),
        (["--epochs", "1"], "--epochs must be at least 2, not 1"),
        (["--world_size", "0"], "--world_size must be at least 1, not 0"),
        (["--max_sequence_length", "0"], "--max_sequence_length must be at least 1, not 0"),
        (["--max_memory", "2GB"], "--max_memory needs --memory_model FILE"),
        (["--memory_model", "none.json"], "--memory_model none.json: must be the memory_model.json of a run"),
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
