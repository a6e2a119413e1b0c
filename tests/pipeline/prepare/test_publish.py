from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_shard
from pipeline.prepare import publish
from pipeline.prepare.publish import WORK, claim_output_folder
from pipeline.schema import MANIFEST_FILE, UserError
from tests.data_dirs import make_patients, write_data_dir

said: list[str] = []


def write(folder: Path, num_patients: int) -> None:
    """A data set of that many patients, a patient a shard."""
    write_data_dir(folder, {"train": make_patients([[1]] * num_patients), "valid": [], "test": []}, shard_size=1)
    dataclasses.replace(Manifest.load(folder), fingerprint=f"of {num_patients}").save(folder)


@contextmanager
def folder(output: Path, fingerprint: str, *, overwrite: bool = False) -> Iterator[Path]:
    """The work folder, where there is something to do."""
    with claim_output_folder(output, lambda: fingerprint, overwrite=overwrite, log=said.append) as claimed:
        assert claimed is not None
        assert claimed[1] == fingerprint
        yield claimed[0]


def prepare(output: Path, num_patients: int, *, overwrite: bool = False) -> None:
    with folder(output, f"of {num_patients}", overwrite=overwrite) as work:
        write(work / "data", num_patients)


def num_patients(output: Path) -> int:
    """Patients of a data set that is whole."""
    return sum(len(read_shard(output, entry).patient_id) for entry in Manifest.load(output).splits["train"])


def files(output: Path) -> set[str]:
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


def test_what_is_staged_comes_out(tmp_path: Path) -> None:
    prepare(tmp_path / "new" / "out", 3)
    assert num_patients(tmp_path / "new" / "out") == 3
    assert files(tmp_path / "new" / "out") == {
        "manifest.json", "index.parquet", "vocabulary.parquet", *(f"train/0000{number}.parquet" for number in range(3)),
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    prepare(tmp_path / "empty", 1)


def test_a_data_set_is_replaced_only_when_told(tmp_path: Path) -> None:
    prepare(tmp_path, 3)
    with pytest.raises(UserError, match="holds a data set of other input or options; give --overwrite"):
        prepare(tmp_path, 1)
    assert num_patients(tmp_path) == 3
    prepare(tmp_path, 1, overwrite=True)
    assert num_patients(tmp_path) == 1
    assert {name for name in files(tmp_path) if name.startswith("train")} == {"train/00000.parquet"}


def state(path: Path) -> tuple[int, ...]:
    """What writing changes, and reading does not (as it may change the time of access)."""
    stat = path.stat()
    return stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_there(output: Path, num_patients: int) -> bool:
    with claim_output_folder(output, lambda: f"of {num_patients}", overwrite=False, log=said.append) as claimed:
        return claimed is None


def test_the_same_data_set_is_recognised_and_left_alone(tmp_path: Path) -> None:
    prepare(tmp_path, 2)
    before = {path: state(path) for path in tmp_path.rglob("*") if path.is_file()}
    said.clear()
    assert is_there(tmp_path, 2)
    assert said == ["the data set of this input and these options is here already; nothing to do"]
    assert {path: state(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    for harm in (lambda path: os.truncate(path, 10), Path.unlink):
        harm(tmp_path / "train" / "00001.parquet")
        with pytest.raises(UserError, match=r"00001\.parquet: missing, or not as it was written; give --overwrite"):
            is_there(tmp_path, 2)
    prepare(tmp_path, 2, overwrite=True)
    assert is_there(tmp_path, 2)


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds 'thesis\.txt' and no data set"):
            prepare(tmp_path, 1, overwrite=overwrite)
    assert files(tmp_path) == {"thesis.txt"}

    prepare(tmp_path / "out", 2)
    (tmp_path / "out" / "train" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "train" / "00002.parquet").write_text("mine")
    prepare(tmp_path / "out", 1, overwrite=True)
    assert (tmp_path / "out" / "train" / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"00002\.parquet: not made by preprocess\.py"):
        prepare(tmp_path / "out", 3, overwrite=True)
    assert num_patients(tmp_path / "out") == 1
    assert not (tmp_path / "out" / WORK).exists()


def test_a_folder_that_only_looks_like_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not made by preprocess"):
        prepare(tmp_path, 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        prepare(tmp_path / "file", 1)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / MANIFEST_FILE).write_text("{}")
    with pytest.raises(UserError, match="not a manifest of this project"):
        prepare(tmp_path / "odd", 1, overwrite=True)
    assert files(tmp_path) == {f"{WORK}/thesis.txt", "file", f"odd/{MANIFEST_FILE}"}


def fail(output: Path) -> None:
    with folder(output, "failing", overwrite=True) as work:
        write(work / "data", 1)
        raise ZeroDivisionError


def test_a_failing_run_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    prepare(tmp_path / "old", 3)
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "old", tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(ZeroDivisionError):
            fail(output)
    assert num_patients(tmp_path / "old") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old"]
    assert not any((tmp_path / "empty").iterdir())


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with folder(tmp_path, "first") as work:
        with pytest.raises(UserError, match=r"another preprocess\.py is writing here"):
            prepare(tmp_path, 1)
        write(work / "data", 2)
    assert num_patients(tmp_path) == 2


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / WORK / "spills").mkdir(parents=True)
    (tmp_path / WORK / "lock").touch()
    (tmp_path / WORK / "spills" / "00000.events.arrow").touch()
    prepare(tmp_path, 1)
    assert num_patients(tmp_path) == 1
    assert not (tmp_path / WORK).exists()


@pytest.mark.parametrize("stop", [OSError("the disk is full"), KeyboardInterrupt(), MemoryError()])
def test_what_a_stopped_run_left_is_there_for_the_next_of_the_same_fingerprint(
    tmp_path: Path, stop: BaseException
) -> None:
    def run(fingerprint: str) -> list[str]:
        """What it finds, before it is stopped; it leaves two files, one of them not complete."""
        found = []
        with suppress(type(stop)), folder(tmp_path, fingerprint) as work:
            found = sorted(path.name for path in work.rglob("*") if path.is_file())
            (work / "spills").mkdir(exist_ok=True)
            (work / "spills" / "00000.arrow").touch()
            (work / "spills" / ".00001.arrow.tmp").touch()
            raise stop
        return found

    said.clear()
    assert run("a") == ["lock", "run.json"]
    assert run("a") == ["00000.arrow", "lock", "run.json"]
    assert said == ["an earlier run was stopped; it goes on where it was"]
    assert run("b") == ["lock", "run.json"]
    assert "beginning afresh" in said[1]
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="thesis"):
        prepare(tmp_path, 1)
    (tmp_path / "thesis.txt").unlink()
    assert run("b") == ["00000.arrow", "lock", "run.json"]  # a refusal costs nothing
    prepare(tmp_path, 1)
    assert not (tmp_path / WORK).exists()


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleared up after it."""


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_step_of_publishing_is_made_good_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    """Every system call that changes the folder is the last one once; then the new data set must come out whole."""
    whole = tmp_path / "whole"
    prepare(whole, 3)
    changes = [(os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink"), (Path, "mkdir"), (Path, "rmdir")]
    for last_step in range(100):
        output = tmp_path / f"{last_step}"
        if replacing:
            prepare(output, 5)
            (output / "notes.txt").write_text("mine")
        steps_left = last_step

        def counted(change: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal steps_left
                if steps_left == 0:
                    raise Killed
                steps_left -= 1
                return change(*arguments, **options)

            return call

        killed = False
        with monkeypatch.context() as patch:
            try:
                with folder(output, "of 3", overwrite=replacing) as work:
                    write(work / "data", 3)
                    for owner, name in changes:
                        patch.setattr(owner, name, counted(getattr(owner, name)))
            except Killed:
                killed = True
        if not killed:
            assert num_patients(output) == 3
            break
        before = (output / MANIFEST_FILE).exists()
        assert not before or num_patients(output) in {3, 5}  # a manifest means a whole data set
        with pytest.raises(UserError, match="holds a data set of other"):  # the next run ends the move first
            prepare(output, 1)
        assert num_patients(output) == 3
        assert not (output / WORK).exists()
        assert files(output) - {"notes.txt"} == files(whole)
        assert not replacing or (output / "notes.txt").read_text() == "mine"
    assert last_step > (10 if replacing else 4)
    assert publish.WORK == WORK


def test_a_run_killed_after_publishing_leaves_nothing_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journal would say that shards are done that are no longer in the work folder."""

    def kill(work: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.prepare.publish._remove", kill)
        with suppress(Killed), folder(tmp_path, "of 3") as work:
            (work / "journal").mkdir()
            write(work / "data", 3)
    assert (tmp_path / WORK / "journal").exists()
    with folder(tmp_path, "of 3", overwrite=True) as work:
        assert not (work / "journal").exists()
        write(work / "data", 3)
    assert num_patients(tmp_path) == 3


def test_a_run_killed_while_it_clears_up_is_no_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(folder: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", kill)
        with pytest.raises(Killed):
            prepare(tmp_path, 2)
    assert [path.name for path in (tmp_path / WORK).iterdir()] == []
    assert is_there(tmp_path, 2)
    assert not (tmp_path / WORK).exists()
