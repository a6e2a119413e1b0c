"""The command line of training: whole runs on tiny data, in processes of their own where it matters."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import preprocess
import train
import training.begin
import training.step
from model.losses import LossOptions, beta_at
from model.prepared import PreparedBatch
from pipeline.dataset.manifest import Manifest
from pipeline.schema import UserError
from tests.data_dirs import make_patients, write_data_dir
from tests.model.helpers import tiny_model
from tests.training.runs import (
    QUICK,
    assert_close,
    assert_same,
    read_metrics,
    run,
    start,
    start_program,
    weights,
    write_tiny_data,
)
from training.checkpoint import Checkpoint
from training.data import DataOptions, DataSet, agree_on_data
from training.graphs import StepGraphs
from training.options import RunOptions, TrainOptions
from training.parallel import World
from training.profiling import PARTS
from training.run import Run
from training.schedule import parameter_groups
from training.state import build_model

if TYPE_CHECKING:
    from tests.object_store import ObjectStore


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Runs set the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "deep" / "er"
    assert run(data, out, report=True) == 0
    return out


def test_the_set_vae_learns_faster_and_forgets_as_slowly() -> None:
    """AdamW takes rate × decay off a weight at each step, which is the same for all matrices; vectors keep theirs."""
    model = tiny_model(width=128)
    groups = parameter_groups(model, 0.1)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group, is_matrix = found[id(parameter)], parameter.ndim > 1 and not name.endswith("bias")
        assert group["lr_scale"] == {"encoder": 1.5, "decoder": 4.0}.get(name.split(".")[0], 1.0)
        assert group["lr_scale"] * group["weight_decay"] == pytest.approx(0.1 if is_matrix else 0.0)


def test_a_run_leaves_what_the_design_says(finished: Path, data: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "metrics.jsonl", "summary.json", "report.html", "MODEL_CARD.md", "TRIPOD_AI.md",
        "predictions_test.parquet", "checkpoints/last.pt", "checkpoints/best.pt",
    }  # fmt: skip
    assert yaml.safe_load((finished / "config.yaml").read_text())["data"]["batch_size"] == 6
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 2 * 5
    assert "12 test, 26 train, 12 valid patients" in (finished / "MODEL_CARD.md").read_text()
    assert summary["test"]["num_labelled"] + summary["test"]["num_unlabelled"] == 12
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [5, 10]
    predictions = pq.read_table(finished / "predictions_test.parquet")
    assert predictions.column_names == ["patient_id", "label", "probability"]
    stored = pq.read_table(data / "tasks" / "default.parquet").to_pylist()
    expected = {row["patient_id"]: row["label"] for row in stored if row["split"] == "test"}
    assert dict(zip(predictions["patient_id"].to_pylist(), predictions["label"].to_pylist(), strict=True)) == expected


def test_the_same_seed_gives_the_same_weights(finished: Path, data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "again") == 0
    assert_same(weights(tmp_path / "again"), weights(finished))
    assert run(data, tmp_path / "other", "--seed", "1") == 0
    assert any(not torch.equal(w, weights(finished)[n]) for n, w in weights(tmp_path / "other").items())


@pytest.mark.parametrize("padding", ["--use_dynamic_padding", "--no-use_dynamic_padding"])
def test_padding_does_not_change_the_weights(finished: Path, data: Path, tmp_path: Path, padding: str) -> None:
    assert run(data, tmp_path, padding) == 0
    assert_same(weights(tmp_path), weights(finished), 1e-5)
    waste = json.loads((tmp_path / "summary.json").read_text())["event_padding_waste"]
    least = json.loads((finished / "summary.json").read_text())["event_padding_waste"]
    assert waste == pytest.approx(least) if padding.startswith("--use") else waste > least + 0.1


@pytest.mark.parametrize("flag", [["--gradient_checkpointing"], ["--prefetch", "0"]])
def test_flags_that_change_no_number(finished: Path, data: Path, tmp_path: Path, flag: list[str]) -> None:
    assert run(data, tmp_path, *flag) == 0
    assert_same(weights(tmp_path), weights(finished))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(
    finished: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(data, tmp_path, "--checkpoint_steps", "1", "--log_steps", "1")
    last = tmp_path / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    steps = Checkpoint.load(last).step
    assert 1 <= steps < 10, "the run was over before it could be disturbed"
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "--resume" in errors
    (last.parent / f".last.pt.{'0' * 32}.tmp").write_bytes(b"of a save that was killed")
    assert run(data, tmp_path, "--resume") == 0
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.pt", "last.pt"]
    assert_same(weights(tmp_path), weights(finished))
    assert_same(weights(tmp_path, "best"), weights(finished, "best"))
    assert_same(weights(tmp_path, which="ema_model"), weights(finished, which="ema_model"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps_logged = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps_logged == sorted(set(steps_logged)), "a resumed run holds no step twice"


def test_resumed_between_groups_of_a_later_epoch_is_the_undisturbed_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a budget epochs have different numbers of batches, and groups begin at different steps."""
    flags = ["--batch_size", "9", "--max_events", "70", "--group_events", "200", "--checkpoint_steps", "1"]
    save = Run.save_last
    steps: dict[tuple[int, int], int] = {}  # the last in each group
    lengths = {}

    def save_and_copy(job: Run) -> None:
        save(job)
        loader, step = job.state.loader, job.state.progress.step
        place = loader.state_dict()
        steps[place["epoch"], place["group"]] = step
        lengths[loader.epoch] = len(loader)
        shutil.copytree(job.directory / "checkpoints", tmp_path / str(step) / "checkpoints", dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_last", save_and_copy)
        assert run(data, tmp_path / "whole", *flags) == 0
    assert lengths[0] != lengths[1]
    out = tmp_path / str(steps[1, 0])
    assert run(data, out, *flags, "--resume") == 0
    assert_same(weights(out), weights(tmp_path / "whole"))


def test_resume_of_a_finished_run_and_of_none(finished: Path, data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--resume") == 0
    assert run(data, tmp_path, "--resume") == 0
    assert_same(weights(tmp_path), weights(finished))


def test_two_devices_give_the_weights_of_one(finished: Path, data: Path, tmp_path: Path) -> None:
    """On the same global batches, with noise on; the last batch of 2 patients is a patient each."""
    process = start_program(data, tmp_path, "--devices", "2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same(weights(tmp_path), weights(finished), 1e-5)
    one, two = (pq.read_table(out / "predictions_test.parquet").to_pydict() for out in (finished, tmp_path))
    assert one["patient_id"] == two["patient_id"]
    assert one["probability"] == pytest.approx(two["probability"], abs=1e-4)
    assert output.count("test AUROC") == 1


def test_a_rank_without_patients_takes_part(data: Path, tmp_path: Path) -> None:
    """26 patients in batches of 5 leave one for two ranks."""
    process = start(data, tmp_path / "two", "--devices", "2", "--batch_size", "5", "--max_epochs", "1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert run(data, tmp_path / "one", "--batch_size", "5", "--max_epochs", "1") == 0
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_alike(finished: Path, data: Path, tmp_path: Path, precision: str) -> None:
    assert run(data, tmp_path, "--precision", precision) == 0
    lines = [(out / "metrics.jsonl").read_text().splitlines()[-1] for out in (finished, tmp_path)]
    exact, rough = (json.loads(line)["loss"] for line in lines)
    assert rough == pytest.approx(exact, rel=0.05)
    assert rough != exact


def test_weights_are_averaged(finished: Path, data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--ema_decay", "0") == 0
    assert_same(weights(tmp_path), weights(finished))
    assert_same(weights(tmp_path, which="ema_model"), weights(tmp_path))
    ema = weights(finished, which="ema_model")
    assert any(not torch.equal(ema[name], tensor) for name, tensor in weights(finished).items())


def test_evaluate_gives_what_training_gave(finished: Path, data: Path, tmp_path: Path) -> None:
    best = str(finished / "checkpoints" / "best.pt")
    assert run(data, tmp_path, "--evaluate", best) == 0
    test = json.loads((tmp_path / "evaluation_test.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())["test"]
    assert_close(test, summary)
    found, expected = (pq.read_table(out / "predictions_test.parquet") for out in (tmp_path, finished))
    assert found["probability"].to_pylist() == pytest.approx(expected["probability"].to_pylist(), abs=1e-6)
    assert found.drop_columns("probability").equals(expected.drop_columns("probability"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_is_evaluated_on_new_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--like`` gives them the vocabulary that the checkpoint knows; prepared for themselves, they have another."""

    def prepare(name: str, source: str, *flags: object) -> Path:
        data = tmp_path / name
        command = [source, "--output", data, "--workers", "1", *flags]
        assert preprocess.main([str(word) for word in command]) == 0
        return data

    old = prepare("old", "synthetic", "--num_patients", 12)
    assert run(old, tmp_path / "run", "--preset", "small", "--max_epochs", "1") == 0
    best = str(tmp_path / "run" / "checkpoints" / "best.pt")
    rows = [f"p{n},{n % 3},{name},{n}" for n in range(9) for name in ("variable_00", "variable_39", "a stranger")]
    (tmp_path / "new.csv").write_text("\n".join(["patient_id,minute,variable,value", *rows]) + "\n")
    (tmp_path / "labels.csv").write_text("patient_id,label\n" + "".join(f"p{n},{n % 2}\n" for n in range(8)))
    new = prepare("new", str(tmp_path / "new.csv"), "--like", old, "--labels", tmp_path / "labels.csv")
    summary = json.loads((new / "summary.json").read_text())
    assert summary["unknown_variables"] == {"a stranger": 9}
    assert summary["unknown_variable_events"] == 9

    assert run(new, tmp_path / "evaluation", "--evaluate", best) == 0
    predictions = pq.read_table(tmp_path / "evaluation" / "predictions_test.parquet").to_pylist()
    expected = [(f"p{n}", n % 2 if n < 8 else None) for n in range(9)]
    assert [(row["patient_id"], row["label"]) for row in predictions] == expected
    assert all(0 < row["probability"] < 1 for row in predictions)
    assert len({row["probability"] for row in predictions}) == 9
    metrics = json.loads((tmp_path / "evaluation" / "evaluation_test.json").read_text())
    assert (metrics["num_labelled"], metrics["num_unlabelled"]) == (8, 1)

    unlabelled = prepare("unlabelled", str(tmp_path / "new.csv"), "--like", old)
    assert run(unlabelled, tmp_path / "predicted", "--evaluate", best) == 0
    assert "has no task default; whole patients are evaluated, without labels" in capsys.readouterr().err
    again = pq.read_table(tmp_path / "predicted" / "predictions_test.parquet").to_pylist()
    assert [row["probability"] for row in again] == [row["probability"] for row in predictions]
    assert {row["label"] for row in again} == {None}

    other = prepare("other", str(tmp_path / "new.csv"))
    capsys.readouterr()
    assert run(other, tmp_path / "refused", "--evaluate", best, "--evaluate_split", "train") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "best.pt: trained with another vocabulary" in line
    assert "--like" in line
    assert not (tmp_path / "refused").exists()


def test_profile_memory_early_stopping_and_verbose(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--profile_memory", "--verbose", "--patience", "1", "--max_epochs", "30", "--learning_rate", "0"]
    assert run(data, tmp_path, *flags) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["stopped_by"] == "patience"
    assert json.loads((tmp_path / "summary.json").read_text())["profiled_peak_rss_bytes"] > 1e8
    text = (tmp_path / "memory.csv").read_text()
    assert all(event in text for event in ("first step", "validation", "checkpoint"))
    assert "grad_norm" in capsys.readouterr().err


def test_profile(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path, "--profile", report=True) == 0
    assert_same(weights(tmp_path), weights(finished))
    profile = json.loads((tmp_path / "summary.json").read_text())["profile"]
    assert profile["recorded_steps"] == 4  # of the five steps of an epoch
    parts = profile["parts"]
    assert all(parts[name]["milliseconds"] > 0 for name in PARTS)
    assert sum(row["share"] for name, row in parts.items() if name != "step") == pytest.approx(1, abs=0.01)
    assert parts["backward"]["gflop"] > parts["encoder"]["gflop"] > 0
    assert (tmp_path / "trace.json.gz").exists()
    assert "mean of 4 recorded steps" in capsys.readouterr().err
    assert "Where the time goes" in (tmp_path / "report.html").read_text()


def test_the_head_is_fine_tuned_on_a_pretrained_model(data: Path, tmp_path: Path) -> None:
    """With --freeze fine-tuning moves the head alone, without it all."""
    assert run(data, tmp_path / "pre", "--objective", "pretrain", "--weight_decay", "0") == 0
    pretrained = str(tmp_path / "pre" / "checkpoints" / "best.pt")
    given = weights(tmp_path / "pre", "best", "ema_model")
    assert run(data, tmp_path / "head", "--objective", "supervised", "--init_from", pretrained, "--freeze") == 0
    assert run(data, tmp_path / "all", "--init_from", pretrained) == 0
    for name, after in weights(tmp_path / "head").items():
        fixed = not name.startswith("head.") or name.startswith("head.feature_")
        assert not fixed or torch.equal(after, given[name]), name
    moved = [name for name, after in weights(tmp_path / "head").items() if not torch.equal(after, given[name])]
    assert "head.ensembles.0.output" in moved
    assert not torch.equal(weights(tmp_path / "all")["encoder.posterior.weight"], given["encoder.posterior.weight"])


def test_pretraining_needs_and_uses_no_label(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--objective", "pretrain", "--max_epochs", "1", "--weight_decay", "0") == 0
    options = TrainOptions(data=DataOptions(data_dir=str(data)), run=RunOptions(output_dir="-"))
    folder = options.data.open_folder()
    found = DataSet(options=options.data, folder=folder, manifest=Manifest.load(folder), tasks=(), quarantined={})
    untrained = build_model(options, found).state_dict()
    after = weights(tmp_path)
    assert torch.equal(after["head.ensembles.0.output"], untrained["head.ensembles.0.output"])
    assert not torch.equal(after["decoder.output.weight"], untrained["decoder.output.weight"])


def test_beta_rises_once_or_in_cycles() -> None:
    once = LossOptions(beta=1.0, beta_warmup_steps=2)
    again = LossOptions(beta=1.0, beta_warmup_steps=2, beta_schedule="cyclical")
    assert [beta_at(once, step) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert [beta_at(again, step) for step in range(6)] == [0.5, 1, 1, 1, 0.5, 1]


def test_the_card_and_the_latents(finished: Path, data: Path, tmp_path: Path) -> None:
    best = str(finished / "checkpoints" / "best.pt")
    assert run(data, tmp_path, "--evaluate", best, "--export_latents", "--baselines") == 0
    card = json.loads((tmp_path / "evaluation_test.json").read_text())
    assert set(card["after_the_first"]) == {"6 hours", "12 hours", "24 hours", "48 hours"}
    assert sum(bucket["patients"] for bucket in card["by_length"].values()) == card["num_labelled"]
    assert card["reconstruction_error"] == pytest.approx(card["reconstruction"], rel=1e-5)
    assert set(card["baselines"]) == {"trees", "logistic_regression"}
    assert {of["num_labelled"] for of in card["baselines"].values()} == {card["num_labelled"]}
    latents = pq.read_table(tmp_path / "latents_test.parquet")
    assert len(set(latents["patient_id"].to_pylist())) == 12
    assert {len(mu) for mu in latents["mu"].to_pylist()} == {64}


def test_inspect_prints_batches(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--data_dir", str(data), "--inspect"]) == 0
    text = capsys.readouterr().out
    for split, number in (("training", 26), ("validation", 12)):
        for size in (1, 2, 4, 8):
            assert f"{split} batches, batch_size {size}:\n  {-(-number // size)} batches an epoch" in text
    for word in (
        "var",
        "val",
        "minute",
        "set_id",
        "label",
        "padding_mask.sum()",
        "predictions",
        "loss",
        "MiB a patient",
    ):
        assert text.count(word) >= 8
    assert "reconstruction 0.0000" not in text
    assert text.splitlines()[-1].startswith("all is well: 8 batches")


def damaged_shard(data: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(data), str(copy)], check=True)
    shard = copy / "train" / "00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return copy


def test_bad_input_is_one_line_and_exit_code_2(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(finished / "checkpoints" / "best.pt")
    no_checkpoint = tmp_path / "x.pt"
    no_checkpoint.write_bytes(b"no")
    cases = [
        (["--data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "o")], "manifest"),
        (["--data_dir", str(damaged_shard(data, tmp_path)), "--output_dir", str(tmp_path / "o")], "00001.parquet"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--batch_size", "0"], "--batch_size"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--evaluate", str(no_checkpoint)], "x.pt"),
        (["--data_dir", str(data), "--output_dir", str(finished)], "--resume"),
        (
            ["--data_dir", str(data), "--output_dir", str(finished), *QUICK, "--resume", "--preset", "reference"],
            "--preset reference cannot be combined",
        ),
        (["--data_dir", str(data), "--output_dir", str(finished), "--resume", "--batch_size", "3"], "batch_size"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--max_events", "1"], "--max_events"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--cache_bytes", "much"], "--cache_bytes much"),
        (["--data_dir", "memory://nowhere", "--output_dir", str(tmp_path / "o")], "memory://nowhere/manifest.json"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--device", "cuda"], "--device cuda"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--evaluate", best, "--no_such"], "--no_such"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--init_from", str(no_checkpoint)], "x.pt"),
        (["--data_dir", str(data), "--output_dir", str(tmp_path / "o"), "--freeze"], "--init_from"),
    ]
    for arguments, expected in cases:
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        assert train.main(arguments) == 2, arguments
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert expected in lines[0]
        assert not (tmp_path / "o" / "summary.json").exists()


def test_an_object_store_gives_the_weights_of_the_folder(
    finished: Path, data: Path, tmp_path: Path, store: ObjectStore
) -> None:
    url = store.upload(data, tmp_path.name)
    flags = ["--cache_dir", str(tmp_path / "cache"), "--cache_bytes", "20kB"]
    assert train.main(["--data_dir", url, "--output_dir", str(tmp_path / "run"), *QUICK, *flags]) == 0
    assert_same(weights(tmp_path / "run"), weights(finished))
    assert_same(weights(tmp_path / "run", "best"), weights(finished, "best"))


def without_shard(data: Path, tmp_path: Path, path: str) -> Path:
    """The data set as if it had never had that shard."""
    copy = Path(shutil.copytree(data, tmp_path / "without"))
    Manifest.load(copy).without([path]).save(copy)
    (copy / path).unlink()
    return copy


@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_quarantined_shard_is_as_if_it_was_not_there_but_counted(data: Path, tmp_path: Path, devices: str) -> None:
    damaged, whole = damaged_shard(data, tmp_path), without_shard(data, tmp_path, "train/00001.parquet")
    (damaged / "test" / "00000.parquet").unlink()
    quarantine = ["--on_bad_shard", "quarantine", "--devices", devices, "--device", "cpu", "--max_epochs", "1"]
    process = start(damaged, tmp_path / "run", *quarantine)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    warnings = [line for line in errors.splitlines() if line.startswith("warning: ")]
    differs = "checksum differs from the manifest's"
    assert warnings == [
        f"warning: {damaged}/test/00000.parquet: is missing; its 5 test patients are left out",
        f"warning: {damaged}/train/00001.parquet: {differs}; its 5 train patients are left out",
    ]
    assert run(whole, tmp_path / "expected", "--max_epochs", "1") == 0
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "expected"), 0.0 if devices == "1" else 1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["quarantined_patients"] == {"train": 5, "valid": 0, "test": 5}
    assert summary["quarantined_shards"] == ["test/00000.parquet", "train/00001.parquet"]
    assert summary["test"]["num_labelled"] + summary["test"]["num_unlabelled"] == 12 - 5
    (event,) = (line for line in read_metrics(tmp_path / "run") if line["kind"] == "event")
    assert event == {
        "kind": "event", "step": 0, "event": "quarantine", "train_patients": 5, "valid_patients": 0, "test_patients": 5,
    }  # fmt: skip
    if devices == "1":
        best = str(tmp_path / "run" / "checkpoints" / "best.pt")
        assert run(damaged, tmp_path / "evaluation", "--evaluate", best, *quarantine) == 0
        evaluation = json.loads((tmp_path / "evaluation" / "evaluation_test.json").read_text())
        assert (evaluation["quarantined_patients"], evaluation["quarantined_shards"]) == (5, ["test/00000.parquet"])
        assert_close(evaluation, summary["test"])


def test_nothing_bad_is_counted_too(finished: Path, data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--on_bad_shard", "quarantine") == 0
    assert_same(weights(tmp_path), weights(finished))
    nobody = {"train": 0, "valid": 0, "test": 0}
    assert json.loads((tmp_path / "summary.json").read_text())["quarantined_patients"] == nobody
    assert [line["event"] for line in read_metrics(tmp_path) if line["kind"] == "event"] == ["quarantine"]


def test_a_run_is_not_resumed_with_other_shards(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    assert run(copy, tmp_path / "run", "--max_epochs", "1") == 0
    shard = copy / "train" / "00002.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    capsys.readouterr()
    assert run(copy, tmp_path / "run", "--resume", "--on_bad_shard", "quarantine") == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "train.py: cannot resume: quarantined was [] and is now "
        "['train/00002.parquet']; give the same data and flags, or start anew"
    )
    assert run(copy, tmp_path / "other", "--on_bad_shard", "quarantine", "--max_epochs", "1") == 0
    shard.write_bytes(content)
    assert run(copy, tmp_path / "other", "--on_bad_shard", "quarantine", "--resume") == 2
    assert "quarantined was ['train/00002.parquet'] and is now []" in capsys.readouterr().err


def test_what_one_machine_finds_bad_all_leave_out(data: Path, tmp_path: Path) -> None:
    """Two machines with two processes each, and a copy of the data each; one copy is damaged."""
    manifest = Manifest.load(data)
    copies = [data, damaged_shard(data, tmp_path)]
    found: list[dict[str, str]] = []

    def agree(rank: int, gathered: list[Any] | None) -> DataSet:
        world = World(rank, 4, torch.device("cpu"), rank % 2, 2)

        def gather(_: object, item: Any) -> list[Any]:
            found.append(item)
            return gathered or [item]

        options = DataOptions(data_dir=str(copies[rank // 2]), on_bad_shard="quarantine")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(World, "gather", gather)
            return agree_on_data(options, manifest, world, None, "train", "valid")

    for rank in range(4):
        agree(rank, None)
    assert [sorted(bad) for _, bad in found] == [[], [], [], ["train/00001.parquet"]], "each checks its half"
    everything = found.copy()
    assert {tuple(agree(rank, everything).quarantined_shards) for rank in range(4)} == {("train/00001.parquet",)}
    with pytest.raises(UserError, match="not the same data set on all machines"):
        agree(0, [*everything[:3], ("another", {})])


def test_what_goes_wrong_in_one_of_several_processes_is_said_in_a_line(data: Path, tmp_path: Path) -> None:
    process = start(damaged_shard(data, tmp_path), tmp_path / "run", "--devices", "2", "--device", "cpu")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(f"train.py: {tmp_path}/copy/train/00001.parquet: checksum differs")


def test_training_without_validation_or_test_patients(tmp_path: Path) -> None:
    splits = {"train": make_patients([[2, 1], [3], [1, 4]]), "valid": [], "test": []}
    data = write_data_dir(tmp_path / "data", splits)
    assert run(data, tmp_path / "run") == 0
    assert_same(weights(tmp_path / "run", "best"), weights(tmp_path / "run"))


def test_an_empty_train_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data_dir(tmp_path / "data", {"train": [], "valid": [], "test": make_patients([[1]])})
    assert run(data, tmp_path / "run") == 2
    assert "no patients" in capsys.readouterr().err


def test_batches_are_planned_for_the_memory_and_a_resumed_run_keeps_to_it(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--batch_size", "auto", "--max_memory", "64GB", "--max_epochs", "1") == 0
    found = json.loads((tmp_path / "memory_model.json").read_text())
    assert found["batch_size"] == 1, "26 patients leave no 50 steps of 2"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["batch_size"] == "auto"
    (tmp_path / "memory_model.json").write_text(json.dumps({**found, "batch_bytes": found["batch_bytes"] - 1}))
    flags = ["--batch_size", "auto", "--max_memory", "64GB", "--max_epochs", "2", "--resume"]
    assert run(data, tmp_path, *flags) == 2, "other batches"
    (tmp_path / "memory_model.json").write_text(json.dumps(found))
    assert run(data, tmp_path, *flags) == 0


def test_too_little_memory_for_any_step_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.budget.measure_peak", lambda step, _: 10**6 * step.args[0].num_events)
    assert run(data, tmp_path, "--max_memory", "1MB") == 2
    assert "--max_memory" in capsys.readouterr().err


def test_cuda_graphs_are_refused_by_name_without_a_gpu(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "run", "--cuda_graphs", "--device", "cpu") == 2
    assert "--cuda_graphs needs one process with a GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_answers_after_the_first_hours_are_learned_too(data: Path, tmp_path: Path) -> None:
    """Two processes find what one finds, though each has prefixes of its own patients alone."""
    flags = ["--prefix_weight", "0.5", "--max_epochs", "1"]
    assert run(data, tmp_path / "one", *flags) == 0
    assert run(data, tmp_path / "two", *flags, "--devices", "2") == 0
    assert run(data, tmp_path / "without", "--max_epochs", "1") == 0
    one, two, without = (weights(tmp_path / name) for name in ("one", "two", "without"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)
    assert not torch.equal(one["head.ensembles.0.output"], without["head.ensembles.0.output"])


def test_filled_batches_train_the_same_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--cuda_graphs`` without graphs: every step is made as the first of a capacity is."""
    assert run(data, tmp_path / "own", "--max_epochs", "1") == 0
    shapes = []

    def run_nothing(_: StepGraphs, prepared: PreparedBatch, *__: Any) -> None:
        shapes.append(prepared.shape)

    monkeypatch.setattr(training.begin, "check_graphs", lambda *_: None)
    monkeypatch.setattr(StepGraphs, "run", run_nothing)
    assert run(data, tmp_path / "filled", "--max_epochs", "1", "--cuda_graphs") == 0
    assert sum(shape is not None for shape in shapes) > len(shapes) / 2
    own, filled = weights(tmp_path / "own"), weights(tmp_path / "filled")
    assert all(torch.allclose(filled[name], own[name], rtol=1e-3, atol=1e-5) for name in own)


def test_a_batch_without_room_is_taken_in_parts_with_the_same_result(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "whole", "--max_epochs", "1") == 0
    forward_losses = training.step.forward_losses

    def in_little_memory(model: Any, given: Any, *rest: Any) -> Any:
        if given.batch.num_patients > 2:
            raise torch.OutOfMemoryError
        return forward_losses(model, given, *rest)

    monkeypatch.setattr(training.step, "forward_losses", in_little_memory)
    assert run(data, tmp_path / "parts", "--max_epochs", "1") == 0
    assert "warning: out of memory in step " in capsys.readouterr().err
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.allclose(parts[name], whole[name], rtol=1e-3, atol=1e-5) for name in whole)

    def in_none(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training.step, "forward_losses", in_none)
    assert run(data, tmp_path / "none") == 2
    assert "on a single patient" in capsys.readouterr().err
