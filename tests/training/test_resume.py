"""Runs that are stopped and resumed: the end is that of the run that was not stopped; options are obeyed or refused."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import train
import training.card
import training.checkpoint
import training.run_files
from pipeline.options import to_dict
from tests.training.runs import (
    assert_same,
    rank_environments,
    read_folder,
    read_metrics,
    read_summary,
    run,
    run_shortly,
    start,
    untimed,
    weights,
    write_tiny_data,
)
from training import validation
from training.checkpoint import Checkpoint
from training.data import DataOptions
from training.options import AT_RESUME, AtResume, RunOptions, TrainOptions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("run")
    assert run(data, out) == 0
    return out


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextmanager
def killed_in(name: str, *, after: int = 0) -> Iterator[None]:
    """Let the process end when ``train.<name>`` is called once more than ``after`` times."""
    original, calls = getattr(train, name), iter(range(after))

    def call(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, call)
        yield


def copy_before_writes(patch: pytest.MonkeyPatch, out: Path, copies: Path) -> list[str]:
    """Keep what a kill before each file that is written would leave of a run; the names of those files."""
    write, written = train.write_atomically, list[str]()

    def copied(path: Path, content: bytes) -> None:
        shutil.copytree(out, copies / str(len(written)))
        write(path, content)
        written.append(path.name)

    for module in (train, training.card, training.checkpoint, training.run_files):
        patch.setattr(module, "write_atomically", copied)
    return written


WITHIN = ["--validate_steps", "2", "--validate_patients", "5", "--keep_best", "2", "--collapse_steps", "3"]


@pytest.mark.parametrize(
    ("more", "lines"),
    [
        ([], [("train", 2), ("train", 4), ("valid", 5), ("train", 5)]),
        (
            WITHIN,
            [("train", 2), ("valid", 2), ("posterior", 3), ("train", 4), ("valid", 4), ("valid", 5), ("train", 5)],
        ),
    ],
    ids=["epochs", "within"],
)
def test_a_kill_between_any_two_writes_changes_nothing(
    more: list[str], lines: list[tuple[str, int]], data: Path, tmp_path: Path
) -> None:
    flags = ["--max_epochs", "1", "--checkpoint_steps", "3", "--log_steps", "2", *more]
    with pytest.MonkeyPatch.context() as patch:
        written = copy_before_writes(patch, tmp_path / "whole", tmp_path)
        assert run(data, tmp_path / "whole", *flags) == 0
    assert [(line["kind"], line["step"]) for line in read_metrics(tmp_path / "whole")] == lines
    files = sorted(path.stem for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert len(files) == (4 if more else 2)
    expected = untimed(read_summary(tmp_path / "whole"))
    for number, name in enumerate(written):
        out = tmp_path / str(number)
        assert run(data, out, *flags, "--resume") == 0
        assert sorted(path.stem for path in (out / "checkpoints").iterdir()) == files
        for file, which in itertools.product(files, ("model", "ema_model")):
            assert_same(weights(out, file, which), weights(tmp_path / "whole", file, which))
        assert untimed(read_summary(out)) == expected, (number, name)
        assert [(line["kind"], line["step"]) for line in read_metrics(out)] == lines, (number, name)
    best = written.index("best.pt")
    assert "last.pt" in written[best:], "the best checkpoint before the last that counts it"


def test_early_stopping_ends_a_killed_run_where_it_ends_another(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_epochs", "8", "--patience", "1", "--monitor", "loss", "--learning_rate", "0"]
    assert run(data, tmp_path / "whole", *flags) == 0
    whole = read_summary(tmp_path / "whole")
    assert (whole["stopped_by"], whole["steps"]) == ("patience", 10)
    out = tmp_path / "killed"
    with killed_in("finish"), pytest.raises(Killed):
        run(data, out, *flags)
    assert run(data, out, *flags, "--resume") == 0
    assert untimed(read_summary(out)) == untimed(whole)

    before = read_folder(out)
    capsys.readouterr()
    assert run(data, out, *flags, "--resume") == 0
    assert "finished (patience)" in capsys.readouterr().err
    assert read_folder(out) == before, "nothing is written again"
    assert run(data, out, *flags, "--resume", "--patience", "2") == 0, "more patience is obeyed"
    assert read_summary(out)["steps"] == 15


def test_collapse_is_caught_and_ends_a_killed_run_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A KL weight that outweighs everything makes the posterior the prior."""
    flags = ["--beta", "1000", "--free_bits", "0", "--beta_warmup_steps", "0", "--stop_on_collapse"]
    flags += ["--max_epochs", "40", "--learning_rate", "0.01", "--gradient_clip", "100000"]
    with killed_in("finish"), pytest.raises(Killed):
        run(data, tmp_path, *flags)
    assert "collapsed" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "collapsed.pt").exists()
    assert run(data, tmp_path, *flags, "--resume") == 0
    summary = read_summary(tmp_path)
    assert summary["stopped_by"] == "collapse"
    assert summary["steps"] < 40 * 5


# One other value of each flag, for runs that are resumed with it.
OTHER_VALUES: dict[str, list[str]] = {
    "batch_size": ["--batch_size", "7"],
    "max_memory": ["--max_memory", "64GB"],
    "max_events": ["--max_events", "99"],
    "max_sequence_length": ["--max_sequence_length", "9"],
    "task": ["--task", "other"],
    "truncate": ["--truncate", "latest"],
    "share_windows": ["--share_windows"],
    "bucketing": ["--no-bucketing"],
    "bucket_width": ["--bucket_width", "1"],
    "group_events": ["--group_events", "50"],
    "seed": ["--seed", "1"],
    "preset": ["--preset", "reference"],
    "event_form": ["--event_form", "product"],
    "objective": ["--objective", "supervised"],
    "precision": ["--precision", "fp16"],
    "repeats": ["--repeats", "2"],
    "without": ["--without", "contexts"],
    "tree_share": ["--tree_share", "0.5"],
    "distill": ["--distill", "0.5"],
    "sampling": ["--sampling", "balanced"],
    "data_weights": ["--data_weights", "1"],
    "on_bad_shard": ["--on_bad_shard", "quarantine"],
    "use_dynamic_padding": ["--use_dynamic_padding"],
    "event_dropout": ["--event_dropout", "0.1"],
    "dropout": ["--dropout", "0.5"],
    "gradient_checkpointing": ["--gradient_checkpointing"],
    "freeze": ["--freeze", "--init_from", "x"],
    "max_epochs": ["--max_epochs", "3"],
    "learning_rate": ["--learning_rate", "0.002"],
    "weight_decay": ["--weight_decay", "0"],
    "warmup_steps": ["--warmup_steps", "1"],
    "ema_decay": ["--ema_decay", "0"],
    "gradient_clip": ["--gradient_clip", "0"],
    "vae_weight": ["--vae_weight", "0.5"],
    "outcome_weight": ["--outcome_weight", "0.5"],
    "pos_weight": ["--pos_weight", "2"],
    "prefix_weight": ["--prefix_weight", "0.5"],
    "beta": ["--beta", "0.5"],
    "beta_warmup_steps": ["--beta_warmup_steps", "2"],
    "beta_schedule": ["--beta_schedule", "cyclical"],
    "free_bits": ["--free_bits", "0"],
    "checkpoint_steps": ["--checkpoint_steps", "3"],
    "validate_steps": ["--validate_steps", "2"],
    "validate_patients": ["--validate_patients", "3"],
    "keep_best": ["--keep_best", "2"],
    "collapse_steps": ["--collapse_steps", "3"],
    "monitor": ["--monitor", "loss"],
    "patience": ["--patience", "3"],
    "min_active_units": ["--min_active_units", "0.5"],
    "log_steps": ["--log_steps", "3"],
    "profile_memory": ["--profile_memory"],
    "verbose": ["--verbose"],
    "prefetch": ["--prefetch", "0"],
    "fetch_ahead": ["--fetch_ahead", "0"],
}


def test_every_flag_is_in_the_table_of_what_may_change() -> None:
    tree = to_dict(TrainOptions(data=DataOptions(data_dir="-"), run=RunOptions(output_dir="-")))
    assert sorted(AT_RESUME) == sorted(name for values in tree.values() for name in values)
    same = {name for name, what in AT_RESUME.items() if what is AtResume.SAME}
    assert same <= {*OTHER_VALUES, "folds"}, "those of cross-fitting are tried in its own tests"


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second epoch."""
    out = tmp_path_factory.mktemp("half")
    with killed_in("train_step", after=7), pytest.raises(Killed):
        run(data, out, "--checkpoint_steps", "1")
    return out


@pytest.mark.parametrize("flag", sorted(OTHER_VALUES))
def test_a_flag_that_differs_is_obeyed_or_refused_by_name(
    flag: str, half: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_run(half, tmp_path / "run")
    before = read_folder(out)
    code = run(data, out, "--checkpoint_steps", "1", *OTHER_VALUES[flag], "--resume")
    error = capsys.readouterr().err
    if AT_RESUME[flag] is AtResume.SAME:
        assert code == 2
        assert len(error.splitlines()) == 1
        assert f"--{flag} " in error
        assert "saved with" in error
        assert read_folder(out) == before, "a command that is refused changes no file"
    else:
        assert code == 0, error
        assert read_summary(out)["steps"] == (15 if flag == "max_epochs" else 10)


def copy_run(source: Path, target: Path) -> Path:
    for name, content in read_folder(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def test_options_that_are_obeyed_have_an_effect(half: Path, data: Path, tmp_path: Path) -> None:
    """Each of these at resume is not the run that was resumed without it."""
    ends = {}
    for number, flags in enumerate(
        ([], ["--weight_decay", "0.5"], ["--dropout", "0.5"], ["--freeze", "--init_from", "x"])
    ):
        out = copy_run(half, tmp_path / str(number))
        assert run(data, out, *flags, "--resume") == 0
        ends[number] = weights(out)
    for number in (1, 2, 3):
        assert any(not torch.equal(ends[number][name], tensor) for name, tensor in ends[0].items())
    start_weights = weights(half)
    moved = {name.partition(".")[0] for name, tensor in ends[3].items() if not torch.equal(tensor, start_weights[name])}
    assert moved == {"head"}


@pytest.fixture(scope="module")
def budgeted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch within a budget of memory."""
    out = tmp_path_factory.mktemp("budgeted")
    with pytest.MonkeyPatch.context() as patch:
        # Measuring would take longer than the run.
        patch.setattr("training.budget.measure_peak", lambda step, _: 10**6 * step.args[0].num_events)
        assert run(data, out, "--max_memory", "64GB", "--max_epochs", "1") == 0
    return out


def test_refused_commands_change_no_file(
    budgeted: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_run(budgeted, tmp_path / "run")
    other = write_tiny_data(tmp_path / "other")
    (other / "train" / "00000.parquet").write_bytes(b"damaged")
    before = read_folder(out)
    capsys.readouterr()
    for source, *flags in (
        (data, "--max_memory", "64GB"),
        (data, "--max_memory", "32GB", "--resume"),
        (data, "--resume"),
        (other, "--max_memory", "64GB", "--resume", "--on_bad_shard", "quarantine"),
        (data, "--max_memory", "64GB", "--resume", "--preset", "reference"),
    ):
        assert run(source, out, "--max_epochs", "2", *flags) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 2
        assert read_folder(out) == before, flags
    assert run(data, out, "--max_memory", "64GB", "--max_epochs", "2", "--resume") == 0


def test_a_budgeted_run_is_resumed_on_another_number_of_devices(budgeted: Path, data: Path, tmp_path: Path) -> None:
    out = copy_run(budgeted, tmp_path / "run")
    process = start(data, out, "--max_memory", "64GB", "--max_epochs", "2", "--resume", "--devices", "2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert read_summary(out)["steps"] == 10


def test_no_checkpoint_holds_a_weight_that_is_not_finite(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, flags in enumerate((["--checkpoint_steps", "1"], [], ["--log_steps", "1"])):
        out = tmp_path / str(number)
        wild = ["--learning_rate", "1e38", "--warmup_steps", "0", "--gradient_clip", "0", "--log_steps", "1000"]
        capsys.readouterr()
        assert run(data, out, *wild, *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert "not finite" in lines[-1]
        assert not any("Traceback" in line for line in lines)
        for path in (out / "checkpoints").glob("*.pt"):
            for which in ("model", "ema_model"):
                assert all(bool(t.isfinite().all()) for t in Checkpoint.load(path).state[which].values()), path


def test_every_step_is_in_some_interval_and_totals_are_of_the_whole_run(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    """Epochs have 5 steps; lines come every 4, over the end of an epoch, and at the end."""
    out = tmp_path / "run"
    flags = ["--log_steps", "4", "--checkpoint_steps", "3"]
    assert run(data, out, *flags, "--max_epochs", "1") == 0
    assert run(data, out, *flags, "--resume") == 0
    lines = [line for line in read_metrics(out) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [4, 5, 8, 10]
    assert all(line["patients_per_second"] > 0 for line in lines)
    progress = Checkpoint.load(out / "checkpoints" / "last.pt").state["progress"]
    assert progress["totals"]["num_patients"] == 2 * 26
    assert progress["totals"]["num_steps"] == 10
    summary, whole = read_summary(out), read_summary(finished)
    assert summary["event_padding_waste"] == pytest.approx(whole["event_padding_waste"])
    assert summary["seconds"] > progress["totals"]["seconds"] > 0


def validate_slowly(arguments: Sequence[str]) -> int:
    original = validation.forward_in_parts

    def slow(*given: Any) -> Iterator[Any]:
        print("validating", flush=True)
        time.sleep(1.5)
        yield from original(*given)

    validation.forward_in_parts = slow
    return run_shortly(arguments)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_is_heard_inside_validation_on_all_ranks(
    ranks: int, finished: Path, data: Path, tmp_path: Path
) -> None:
    environments = rank_environments(2) if ranks == 2 else [{}]
    processes = [
        start(data, tmp_path, "--batch_size", "6", main=validate_slowly, **environment) for environment in environments
    ]
    while not (printed := processes[0].read_output()):
        assert processes[0].poll() is None
        time.sleep(0.02)
    assert printed.startswith("validating\n")
    processes[-1].send_signal(signal.SIGTERM)  # one rank hears it, all stop
    sent = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - sent < 10
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * ranks, errors
    # Two ranks learn of it one poll later, here after the last batch of validation.
    assert f"stopped by signal 15 at step {4 + ranks}" in errors[0]
    assert run(data, tmp_path, "--resume") == 0
    assert_same(weights(tmp_path), weights(finished), 0.0 if ranks == 1 else 1e-5)
    assert read_summary(tmp_path)["best"]["epoch"] == read_summary(finished)["best"]["epoch"]


def test_a_signal_to_the_launcher_of_two_ranks_stops_both_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    process = start(data, tmp_path, "--devices", "2", "--checkpoint_steps", "1", "--max_epochs", "200")
    last = tmp_path / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert Checkpoint.load(last).step >= 1


def test_ranks_without_a_shared_folder_are_told_in_one_line(data: Path, tmp_path: Path) -> None:
    processes = [start(data, tmp_path / environment["RANK"], **environment) for environment in rank_environments(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    lines = [line for error in errors for line in error.splitlines()]
    assert len(lines) == 1, "one of the machine's processes says it"
    assert "rank 1 does not see the files of rank 0" in lines[0]


def test_the_config_of_a_run_repeats_it_bit_for_bit(finished: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--dropout", "0.3", "--seed", "5", "--event_dropout", "0.1", "--weight_decay", "0.2"]
    assert run(data, tmp_path / "one", *flags) == 0
    config = str(tmp_path / "one" / "config.yaml")
    assert train.main(["--config", config, "--output_dir", str(tmp_path / "two")]) == 0
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert train.main(["--config", config, "--output_dir", str(tmp_path / "three"), "--seed", "6"]) == 0
    assert any(not torch.equal(w, weights(tmp_path / "one")[n]) for n, w in weights(tmp_path / "three").items())


def exit_after_a_step(arguments: Sequence[str]) -> int:
    original = train.train_step

    def step(*given: Any) -> None:
        original(*given)
        os._exit(9)

    train.train_step = step
    return run_shortly(arguments)


def test_a_run_after_os_exit_in_the_first_step_after_resume(half: Path, data: Path, tmp_path: Path) -> None:
    """Killed again right after it was resumed, and resumed again."""
    out = copy_run(half, tmp_path / "run")
    process = start(data, out, "--checkpoint_steps", "1", "--resume", main=exit_after_a_step)
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert run(data, out, "--checkpoint_steps", "1", "--resume") == 0
    again = copy_run(half, tmp_path / "other")
    assert run(data, again, "--checkpoint_steps", "1", "--resume") == 0
    assert_same(weights(out), weights(again))
    assert os.listdir(out / "checkpoints") == os.listdir(again / "checkpoints")
