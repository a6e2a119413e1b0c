"""Every file the project writes, damaged: it is named in one line, or what is read is what was written, to the bit."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.prepare.journal
import preprocess
import train
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_shard
from pipeline.dataset.tables import load_embeddings, read_index, read_vocabulary
from pipeline.loading.loader import make_loader
from pipeline.reports.data_report import write_data_report
from pipeline.schema import REPORT_FILE, SPLITS, SUMMARY_FILE, UserError
from tests.faults.conftest import cases
from tests.faults.harm import KINDS, harm
from tests.training.runs import short_end, untimed
from training.checkpoint import Checkpoint
from training.run import Run

Tried = Callable[[str, int], None]

QUICK = [
    "--batch_size",
    "6",
    "--log_steps",
    "2",
    "--warmup_steps",
    "3",
    "--beta_warmup_steps",
    "10",
    "--max_epochs",
    "2",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepare(folder: Path, seed: int) -> Path:
    """A data set with shards of both formats and embeddings; another seed, other patients."""
    rows = ["patient_id,minute,variable,value"]
    rng = random.Random(seed)
    for patient in range(40):
        rows += [
            f"p{patient},{rng.randint(0, 9)},v{rng.randint(0, 7)},{rng.gauss(0, 1)}" for _ in range(rng.randint(1, 12))
        ]
    rows.append("p0,never,v1,1")
    folder.mkdir(parents=True)
    (folder / "in.csv").write_text("\n".join(rows) + "\n")
    (folder / "labels.csv").write_text("patient_id,label\n" + "".join(f"p{n},{n % 2}\n" for n in range(40)))
    (folder / "keys.csv").write_text("Key,0,1,2\n" + "".join(f"v{n},{seed},{n},1\n" for n in range(8)))
    assert preprocess.main(command(folder)) == 0
    return folder


def command(folder: Path) -> list[str]:
    given = ["in.csv", "--labels", "labels.csv", "--embeddings", "keys.csv", "--output", "out"]
    given = [word if word.startswith("--") else str(folder / word) for word in given]
    return [*given, "--shard_format", "both", "--workers", "1", "--split_fractions", "0.5,0.2,0.3"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set, and another one of the same files."""
    base = tmp_path_factory.mktemp("prepared")
    return prepare(base / "mine", 1), prepare(base / "other", 2)


def all_that_is_read(data: Path) -> str:
    """A digest of everything that can reach training, evaluation or a report."""
    digest = hashlib.sha256()
    manifest = Manifest.load(data)
    digest.update(repr(manifest).encode())
    digest.update(load_embeddings(data, manifest).tobytes())
    for table in (read_index(data, manifest), read_vocabulary(data, manifest)):
        digest.update(repr(table.to_pylist()).encode())
    for split in SPLITS:
        for batch in make_loader(data, split=split, batch_size=16, shuffle=False):
            digest.update(repr([batch.patient_id, *(field.tolist() for field in tensors(batch))]).encode())
        for entry in manifest.tars[split]:
            digest.update(read_shard(data, entry).value.tobytes())
    return digest.hexdigest()


def tensors(batch: Any) -> list[torch.Tensor]:
    names = ("code", "value", "has_value", "set_offsets", "minute", "patient_offsets", "label")
    return [getattr(batch, name) for name in names]


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_no_damage_to_a_data_set_reaches_training(
    prepared: tuple[Path, Path], tmp_path: Path, tried: Tried, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine, other), rng = prepared, random.Random(0)
    names = files_of(mine / "out")
    assert {Path(name).suffix for name in names} == {".json", ".parquet", ".npy", ".tar", ".html"}
    right, number, caught = all_that_is_read(mine / "out"), cases(36, 400), 0
    for case in range(number):
        name, kind = names[case % len(names)], KINDS[case // len(names) % len(KINDS)]
        case_dir = tmp_path / str(case)
        shutil.copytree(mine, case_dir)
        done = harm(case_dir / "out" / name, rng, kind, (other / "out" / name).read_bytes())
        try:
            assert all_that_is_read(case_dir / "out") == right, done
        except UserError as error:
            caught += 1
            named = str(case_dir / "out" / name) in str(error)
            # A manifest of another data set is whole: the files beside it are not its own.
            assert named or (kind == "swap" and name == "manifest.json"), f"{done}: {error}"
            assert "\n" not in str(error), done
        try:  # the report reads the rest
            write_data_report(case_dir / "out")
        except UserError:
            caught += 1
        # The same command again says so, or makes nothing.
        capsys.readouterr()
        again = preprocess.main(command_like(mine, case_dir))
        said = capsys.readouterr().err.splitlines()
        assert again in (0, 2), done
        if again == 2:
            assert said[-1].startswith("preprocess.py: "), done
            assert str(case_dir) in said[-1], done
        shutil.rmtree(case_dir)
    assert caught > number // 2
    tried("damage to a data set", number)


def command_like(mine: Path, case_dir: Path) -> list[str]:
    """Of the same input, whose fingerprint knows file names and contents, and no folder."""
    words = command(mine)
    words[words.index("--output") + 1] = str(case_dir / "out")
    return words


@pytest.fixture(scope="module")
def run_dir(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was stopped in the middle of the second, as ``stopped``; the whole, as ``whole``."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("runs")
    save, copies = Run.save_last, []

    def save_and_copy(job: Run) -> None:
        save(job)
        if job.state.progress.step == 5:
            copies.append(shutil.copytree(base / "whole", base / "stopped", dirs_exist_ok=True))

    flags = ["--checkpoint_steps", "1", "--profile_memory"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_last", save_and_copy)
        assert run(prepared[0], base / "whole", *flags) == 0
    assert copies
    assert run(prepared[0], base / "seed1", *flags, "--seed", "1") == 0
    return base


def run(data: Path, out: Path, *flags: str) -> int:
    with short_end(report=True):
        return train.main(["--data_dir", str(data / "out"), "--output_dir", str(out), *QUICK, *flags])


def state_of(path: Path) -> str:
    loaded = Checkpoint.load(path)
    state = loaded.state
    digest = hashlib.sha256(repr((loaded.config, state["loader"], loaded.vocabulary_fingerprint)).encode())
    for part in (state["model"], state["ema_model"]):
        for name, tensor in sorted(part.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    for _, values in sorted(state["optimizer"]["state"].items()):
        for name, value in sorted(values.items()):
            digest.update(name.encode() + value.numpy().tobytes())
    progress = untimed(state["progress"])
    for name in ("totals", "interval"):
        progress[name] = {key: number for key, number in progress[name].items() if key not in ("seconds", "waited")}
    digest.update(repr(progress).encode())
    return digest.hexdigest()


def test_no_damage_to_a_checkpoint_is_loaded(run_dir: Path, tmp_path: Path, tried: Tried) -> None:
    path, rng, number = tmp_path / "last.pt", random.Random(1), cases(40, 400)
    content = (run_dir / "whole" / "checkpoints" / "last.pt").read_bytes()
    right = state_of(run_dir / "whole" / "checkpoints" / "last.pt")
    caught = 0
    for case in range(number):
        path.write_bytes(content)
        done = harm(path, rng, ("flip", "flip", "truncate", "delete")[case % 4], b"")
        try:
            assert state_of(path) == right, done
        except UserError as error:
            caught += 1
            assert str(path) in str(error), done
            assert "\n" not in str(error), done
    assert caught > number * 0.8
    tried("damage to a checkpoint", number)


def test_no_damage_to_a_run_reaches_its_weights(
    prepared: tuple[Path, Path], run_dir: Path, tmp_path: Path, tried: Tried, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped run goes on to the weights of the whole one, or says in a line what is damaged."""
    rng = random.Random(2)
    names = files_of(run_dir / "stopped")
    assert {"checkpoints/last.pt", "checkpoints/best.pt", "config.yaml", "metrics.jsonl", "memory.csv"} <= set(names)
    right, number = state_of(run_dir / "whole" / "checkpoints" / "last.pt"), cases(8, 100)
    for case in range(number):
        name, kind = names[case % len(names)], KINDS[case // len(names) % len(KINDS)]
        out = tmp_path / str(case)
        shutil.copytree(run_dir / "stopped", out)
        done = harm(out / name, rng, kind, (run_dir / "seed1" / name).read_bytes())
        capsys.readouterr()
        status = run(prepared[0], out, "--resume")
        if status:
            assert status == 2, done
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("train.py: "), done
            assert str(out / name) in last or (kind == "swap" and "cannot resume: seed" in last), f"{done}: {last}"
        else:
            assert state_of(out / "checkpoints" / "last.pt") == right, done
        shutil.rmtree(out)
    tried("damage to a run", number)


def test_the_best_checkpoint_is_the_one_that_was_best(
    prepared: tuple[Path, Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir / "whole", tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    right = Checkpoint.load(best)
    assert right.metrics is not None
    other_epoch = dataclasses.replace(right, metrics={**right.metrics, "epoch": 1 - right.metrics["epoch"]})
    for wrong in (
        Checkpoint.load(run_dir / "stopped" / "checkpoints" / "last.pt"),
        Checkpoint.load(run_dir / "seed1" / "checkpoints" / "best.pt"),
        other_epoch,
    ):
        wrong.save(best)
        assert run(prepared[0], tmp_path / "run", "--resume") == 2
        message = f"{best}: not the best checkpoint of this run (saved at step {wrong.step}, last.pt at step 8)"
        assert message in capsys.readouterr().err
    right.save(best)
    assert run(prepared[0], tmp_path / "run", "--resume") == 0


def test_a_report_is_made_of_what_is_whole(run_dir: Path, tmp_path: Path, tried: Tried) -> None:
    from training.report import write_run_report

    rng, number = random.Random(3), cases(12, 100)
    names = [name for name in files_of(run_dir / "whole") if not name.startswith("checkpoints")]
    for case in range(number):
        name, kind = names[case % len(names)], KINDS[case // len(names) % len(KINDS)]
        out = tmp_path / str(case)
        shutil.copytree(run_dir / "whole", out, ignore=shutil.ignore_patterns("checkpoints"))
        done = harm(out / name, rng, kind, (run_dir / "seed1" / name).read_bytes())
        try:
            write_run_report(out)
        except UserError as error:
            assert str(out / name) in str(error), done
        shutil.rmtree(out)
    tried("damage to what a report is made of", number)


def test_no_damage_to_what_a_stopped_run_left_reaches_the_next(
    tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after some task, with a file damaged: the same command gives the same bytes, or a line."""
    rng, number = random.Random(4), cases(6, 100)
    words = ["synthetic", "--num_patients", "40", "--workers", "1", "--events_per_shard", "6000", "--output"]
    assert preprocess.main([*words, str(tmp_path / "whole")]) == 0
    assert preprocess.main([*words, str(tmp_path / "other"), "--seed", "1"]) == 0
    right = bytes_of(tmp_path / "whole")
    done = pipeline.prepare.journal._do
    for case in range(number):
        out, left = tmp_path / str(case), rng.randint(1, 6)

        def stop(*given: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return done(*given)

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.prepare.journal._do", stop)
            assert preprocess.main([*words, str(out)]) == 130
        files = [path for path in sorted((out / ".preprocess").rglob("*")) if path.is_file() and path.name != "lock"]
        path = rng.choice(files)
        others = [file for file in files if file.suffix == path.suffix]
        what = harm(path, rng, KINDS[case % 4], rng.choice(others).read_bytes()) if path.stat().st_size else "nothing"
        status = preprocess.main([*words, str(out)])
        if status:
            assert status == 2, what
            assert preprocess.main([*words, str(out)]) in (0, 2), what
        else:
            assert bytes_of(out) == right, what
        shutil.rmtree(out)
    tried("damage to what a stopped run left", number)


def bytes_of(folder: Path) -> dict[str, bytes]:
    skipped = (SUMMARY_FILE, REPORT_FILE)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in skipped]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
