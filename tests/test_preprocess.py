from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import polars as pl
import pytest

import preprocess
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_shard
from pipeline.loading.loader import make_loader
from pipeline.machine import usable_cores
from pipeline.prepare.command import PreprocessOptions
from pipeline.prepare.executors import ExecutionOptions
from pipeline.schema import MANIFEST_FILE, SPLITS
from tests.pipeline.prepare.test_publish import state

SYNTHETIC = ["synthetic", "--num_patients", "40", "--workers", "1"]
CSV = "patient_id,minute,variable,value\n" + "".join(f"p{number},0,HR,{number}\n" for number in range(30))


def run(*arguments: object) -> int:
    return preprocess.main([str(argument) for argument in arguments])


def test_synthetic_patients_from_the_command_line_to_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    assert run(*SYNTHETIC, "--output", output, "--split_fractions", "0.5,0.25,0.25", "--seed", 1) == 0
    assert sorted(path.name for path in output.iterdir() if path.name not in SPLITS) == [
        "index.parquet", "manifest.json", "rejects.parquet", "report.html", "summary.json", "tasks",
        "vocabulary.parquet",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    assert f"rows {summary['events_in']:,} = written {summary['events_written']:,}" in printed
    assert summary["events_in"] == summary["events_written"] + sum(summary["rejects"].values())
    assert summary["patients"] == 40
    for name in ("seconds", "events_per_second", "peak_rss_bytes"):
        assert summary[name] > 0
    assert Manifest.load(output).options["seed"] == 1

    batches = list(make_loader(output, split="train", batch_size=8))
    events = sum(batch.num_events for batch in batches)
    assert events == summary["splits"]["train"]["events"]
    values = np.concatenate([batch.value[batch.has_value].numpy() for batch in batches])
    codes = np.concatenate([batch.code[batch.has_value].numpy() for batch in batches])
    for code in np.unique(codes):  # train is what the statistics are of
        assert values[codes == code].mean() == pytest.approx(0, abs=1e-4)
        assert values[codes == code].std() == pytest.approx(1, abs=1e-4)


def test_values_come_back_to_their_raw_scale(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(CSV)
    assert run(tmp_path / "in.csv", "--output", tmp_path / "out") == 0
    (vocabulary,) = pl.read_parquet(tmp_path / "out" / "vocabulary.parquet").rows()[2:]
    raw = {
        patient: value * vocabulary[4] + vocabulary[3]
        for split, entries in Manifest.load(tmp_path / "out").splits.items()
        for shard in (read_shard(tmp_path / "out", entry) for entry in entries)
        for patient, value in zip(shard.patient_id.to_pylist(), shard.value, strict=True)
    }
    assert raw == {f"p{number}": pytest.approx(number, abs=1e-5) for number in range(30)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out"], "required: INPUT"),
        (["in.csv"], "required: --output"),
        (["in.csv", "--output", "out", "--formt", "table"], "--formt"),
        (["in.csv", "--output", "out", "--form", "table"], "--form"),  # no abbreviations
        (["in.csv", "--output", "out", "--format", "excel"], "--format: invalid choice: 'excel'"),
        (["in.csv", "--output", "out", "--split_fractions", "0.5,0.6,0.1"], "--split_fractions"),
        (["in.csv", "--output", "out", "--split_fractions", "0,0.5,0.5"], "--split_fractions"),
        (["in.csv", "--output", "out", "--split_fractions", "1"], "--split_fractions"),
        (["in.csv", "--output", "out", "--split_fractions", "a,b,c"], "--split_fractions"),
        (["in.csv", "--output", "out", "--events_per_shard", "0"], "--events_per_shard"),
        (["in.csv", "--output", "out", "--workers", "-1"], "--workers"),
        (["in.csv", "--output", "out", "--split_seed", "x"], "--split_seed"),
        (
            ["in.csv", "--output", "out", "--outlier_action", "clip"],
            "--outlier_action: has no effect without --outlier_std",
        ),
        (["in.csv", "--output", "out", "--outlier_std", "0"], "--outlier_std must be above 0"),
        (["in.csv", "--output", "out", "--min_events", "0"], "--min_events"),
        (["in.csv", "--output", "out", "--min_count", "999"], "--min_count 999: no variable has as many events"),
        (["in.csv", "--output", "out", "--aggregate", "sum"], "--aggregate: invalid choice: 'sum'"),
        (["in.csv", "--output", "out", "--ranges", "no.csv"], "no.csv: no such file"),
        (["in.csv", "--output", "out", "--split_map", "a=tuning"], "--split_map: 'a=tuning' is not NAME=SPLIT"),
        (["in.csv", "--output", "out", "--exclude_codes", "HR"], "--exclude_codes: not used by --format table"),
        (["in.csv", "--output", "out", "--num_patients", "5"], "--num_patients: not used by --format table"),
        (["in.csv", "--output", "out", "--value_column", "x"], "in.csv: no column 'x'"),
        (["in.csv", "--output", "out", "--labels", "no.csv"], "no.csv: no such file"),
        (["in.csv", "--output", "out", "--labels", "strangers.csv"], "strangers.csv: names no patient of the input"),
        (["in.csv", "--output", "out", "--embeddings", "cached.csv"], "cached.csv: no vector for variable 'HR'"),
        (["missing", "--output", "out"], "missing: no such file or folder"),
        (["empty", "--output", "out"], "empty: nothing here"),
        (["in.csv", "--output", "in.csv"], "--output in.csv: lies in the input"),
        (["folder", "--output", "folder/out"], "--output folder/out: lies in the input"),
        (["in.csv", "--output", "strangers.csv"], "strangers.csv: is a file"),
        (["in.csv", "--output", "folder"], "folder: holds 'in.csv' and no data set"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    for path, text in (
        ("in.csv", CSV),
        ("folder/in.csv", CSV),
        ("strangers.csv", "patient_id,label\nx,1\n"),
        ("cached.csv", "Key,0\nRR,1\n"),
    ):
        (tmp_path / path).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("preprocess.py: ")]
    assert message in line
    assert captured.err.endswith(line + "\n")
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_run_does_nothing_and_another_needs_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    assert run(*SYNTHETIC, "--output", output) == 0
    first = (output / MANIFEST_FILE).read_bytes()
    before = state(output / MANIFEST_FILE)
    (output / "report.html").rename(output / f".report.html.{'0' * 32}.tmp")  # as a kill leaves it
    assert run(*SYNTHETIC, "--output", output) == 0
    assert "is here already; nothing to do" in capsys.readouterr().err
    assert state(output / MANIFEST_FILE) == before
    assert (output / "report.html").exists()
    assert not list(output.glob(".*"))
    assert run(*SYNTHETIC, "--output", output, "--seed", 2) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*SYNTHETIC, "--output", output, "--overwrite") == 0
    assert (output / MANIFEST_FILE).read_bytes() == first
    assert run(*SYNTHETIC, "--output", output, "--overwrite", "--seed", 2, "--verbose") == 0
    assert '"events_written"' in capsys.readouterr().out
    assert (output / MANIFEST_FILE).read_bytes() != first


def test_a_full_disk_no_memory_and_an_interrupt_are_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    for stop, status, message in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), 2, "no space left on the disk; free some"),
        (MemoryError(), 2, "out of memory; the same command goes on with fewer --workers"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ):

        def fail(*_: object, stop: BaseException = stop) -> None:
            raise stop

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.prepare.write.write_shard", fail)
            assert run(*SYNTHETIC, "--output", output) == status
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert run(*SYNTHETIC, "--output", output) == 0
    assert "it goes on where it was" in capsys.readouterr().err


def test_as_a_program(tmp_path: Path) -> None:
    program = Path(preprocess.__file__)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "missing", "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"preprocess.py: {tmp_path / 'missing'}: no such file or folder\n"


def test_options_come_from_a_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "options.yaml").write_text(
        f"command: {{input: synthetic, output: {tmp_path / 'file'}}}\n"
        "synthetic: {num_patients: 40, seed: 3}\nsplit: {split_fractions: [0.5, 0.25, 0.25]}\nexecution: {workers: 1}\n"
    )
    assert run("--config", tmp_path / "options.yaml") == 0
    flags = [*SYNTHETIC, "--seed", 3, "--split_fractions", "0.5,0.25,0.25"]
    assert run(*flags, "--output", tmp_path / "flags") == 0
    assert (tmp_path / "file" / MANIFEST_FILE).read_bytes() == (tmp_path / "flags" / MANIFEST_FILE).read_bytes()
    assert run("--config", tmp_path / "options.yaml", "--seed", 4) == 2
    assert "holds a data set of other input or options" in capsys.readouterr().err
    (tmp_path / "options.yaml").write_text("rules: {outlier_action: clip}\n")
    assert run(*SYNTHETIC, "--output", tmp_path / "x", "--config", tmp_path / "options.yaml") == 2
    assert "--outlier_action: has no effect without --outlier_std" in capsys.readouterr().err
    (tmp_path / "options.yaml").write_text("columns: {value_column: x}\n")
    assert run(*SYNTHETIC, "--output", tmp_path / "x", "--config", tmp_path / "options.yaml") == 2
    assert "--value_column: not used by --format synthetic" in capsys.readouterr().err


def test_each_line_of_help_is_a_sentence() -> None:
    for section in get_type_hints(PreprocessOptions).values():
        for field in dataclasses.fields(section):
            text = field.metadata["help"]
            assert text[0].isupper(), field.name
            assert text.endswith("."), field.name


def test_workers_are_the_cores_that_this_process_may_use() -> None:
    assert ExecutionOptions().workers == usable_cores()
