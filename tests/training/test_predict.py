"""``seqsetvae-predict``: raw tables of new patients become the probabilities of ``--like`` and ``--evaluate``."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import preprocess
from model.config import Outcome
from model.saved import SavedModel
from pipeline.dataset.manifest import Manifest
from pipeline.prepare.build import build
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.rules import Range, Rules
from pipeline.prepare.sources.synthetic import Synthetic
from pipeline.prepare.sources.table import Table
from pipeline.schema import UserError
from pipeline.storage.folder import Folder
from tests.training.runs import run
from tests.training.test_export import write_checkpoint
from training import predict
from training.checkpoint import Checkpoint
from training.export import export_checkpoint, read_checkpoint
from training.options import parse_train_options
from training.predict import predict_patients

RULES = Rules(
    ranges={"v1": Range(low=-3.0, high=9.0, action="reject")},
    outlier_std=2.0,
    outlier_action="clip",
    aggregate="last",
    min_events=3,
    min_count=12,
)


def some_rows(num_rows: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    variable = rng.integers(0, 10, num_rows) * rng.integers(0, 2, num_rows)  # v0 is frequent
    return pl.DataFrame(
        {
            "patient_id": [f"p{number:03d}" for number in rng.integers(0, 90, num_rows)],
            "minute": rng.integers(0, 300, num_rows) / 4,
            "variable": [f"v{number}" for number in variable],
            "value": rng.normal(size=num_rows) * (1 + variable),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    some_rows(600, 0).write_parquet(folder / "rows.parquet")
    pl.DataFrame({"patient_id": ["p001", "p002"], "label": [0, 1]}).write_csv(folder / "labels.csv")
    build(Table(path=folder / "rows.parquet", labels=folder / "labels.csv"), folder / "data", BuildOptions(rules=RULES))
    return folder / "data"


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other patients, some with too few events, with a variable that the model does not know and one value too high."""
    path = tmp_path_factory.mktemp("new") / "new.parquet"
    strange = pl.DataFrame({"patient_id": "p005", "minute": 3.5, "variable": ["other", "v1"], "value": [1.0, 99.0]})
    pl.concat([some_rows(300, 1), strange]).write_parquet(path)
    return path


def read_model(path: Path, data: Path) -> SavedModel:
    return read_checkpoint(Checkpoint.load(path), path, Folder(data), Manifest.load(data))


def export(path: Path, data: Path, folder: Path) -> Path:
    flags = ["--data_dir", str(data), "--evaluate", str(path), "--export", str(folder)]
    options = parse_train_options(flags)
    assert export_checkpoint(options, Manifest.load(data)) == 0
    return folder


@pytest.mark.parametrize("cut", [{}, {"max_sequence_length": 3, "truncate": "latest"}])
def test_predictions_are_those_of_like_and_evaluate(
    data: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: dict[str, Any]
) -> None:
    path = write_checkpoint(tmp_path / "best.pt", data, 2, **cut)
    prepared = ["--output", str(tmp_path / "prepared"), "--like", str(data), "--workers", "1"]
    assert preprocess.main([str(new), *prepared]) == 0
    flags = [word for name, value in cut.items() for word in (f"--{name}", str(value))]
    assert run(tmp_path / "prepared", tmp_path / "out", "--evaluate", str(path), *flags) == 0
    expected = pq.read_table(tmp_path / "out" / "predictions_test.parquet").drop_columns("label")
    assert expected.num_rows > 40
    probability = pytest.approx(expected["probability"].to_pylist(), abs=1e-6)  # --evaluate answers after hours too
    folder, flags = export(path, data, tmp_path / "model"), ["--batch_size", "6", "--threads", "1"]
    capsys.readouterr()
    for number, source in enumerate((folder, path)):
        output = tmp_path / "deep" / f"{number}.parquet"
        assert predict.main([str(source), str(new), "--output", str(output), *flags]) == 0
        found = pq.read_table(output)
        assert found.schema == expected.schema
        assert found["patient_id"] == expected["patient_id"]
        assert found["probability"].to_pylist() == probability
        lines = capsys.readouterr().err.splitlines()
        assert lines[1] == f"{new}: 1 events of variables that the model does not know: other"
        assert "out_of_range" in lines[0]
        assert lines[2].endswith("patients without an event that can be used have no prediction")
    assert predict.main([str(folder), str(new), *flags]) == 0
    shown = pl.read_csv(capsys.readouterr().out.encode())
    assert shown["patient_id"].to_list() == expected["patient_id"].to_pylist()
    assert shown["probability"].to_list() == probability


def test_a_frame_with_columns_of_other_names(data: Path, new: Path, tmp_path: Path) -> None:
    model = read_model(write_checkpoint(tmp_path / "best.pt", data), data)
    frame = pl.read_parquet(new)
    expected = predict_patients(model, new)
    renamed = frame.rename({"patient_id": "stay", "value": "amount"})
    columns = {"patient_column": "stay", "value_column": "amount"}
    assert predict_patients(model, renamed, columns=columns).equals(expected)
    assert predict_patients(model, frame.to_pandas(), batch_size=50).num_rows == expected.num_rows


def test_codes_that_the_task_excludes_say_nothing(data: Path, new: Path, tmp_path: Path) -> None:
    """Of each outcome; a patient who has no other events is answered with what is known of everybody."""
    outcomes = (
        Outcome(name="default", prior=(0.75, 0.25)),
        Outcome(name="unit", kind="multiclass", classes=("a", "b", "c"), prior=(0.5, 0.25, 0.25)),
        Outcome(name="los", kind="regression", classes=(), prior=(7.0,)),
    )
    path = write_checkpoint(tmp_path / "best.pt", data, outcomes=outcomes, objective="pretrain")
    model = read_model(path, data)
    with pytest.raises(UserError, match="--objective pretrain and predicts nothing"):
        predict_patients(model, new)
    code = model.vocabulary["variable"].index("v0")
    described = {**model.description, "objective": "joint"}
    model.description = {**described, "samples": {**described["samples"], "excluded_codes": [1, code]}}
    alone = pl.DataFrame({"patient_id": "alone", "minute": [1.0, 2, 3], "variable": "v0", "value": 1.0})
    found = predict_patients(model, pl.concat([pl.read_parquet(new), alone])).to_pylist()
    assert found[0] == {
        "patient_id": "alone", "default_probability": 0.25, "unit_prediction": "a", "unit_probability_a": 0.5,
        "unit_probability_b": 0.25, "unit_probability_c": 0.25, "los_prediction": 7.0,
    }  # fmt: skip
    model.description = described
    whole = {row["patient_id"]: row for row in predict_patients(model, new).to_pylist()}
    known = set(model.vocabulary["variable"]) - {"v0"}
    others = {row["patient_id"]: row for row in found}
    kept = pl.read_parquet(new).filter(pl.col("variable").is_in(known))
    patient = kept.group_by("patient_id").len().sort("len", "patient_id")["patient_id"][-1]
    own = predict_patients(model, kept.filter(patient_id=patient)).to_pylist()[0]
    assert others[patient]["los_prediction"] == pytest.approx(own["los_prediction"], abs=1e-5)
    assert others[patient]["los_prediction"] != pytest.approx(whole[patient]["los_prediction"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model"], "the following arguments are required: TABLE"),
        (["model", "new", "--output", "x.txt"], "--output x.txt: end its name in .parquet or .csv"),
        (["empty", "new"], "empty: no model folder, config.json is missing"),
        (["nothing.pt", "new"], "nothing.pt: no such checkpoint"),
        (["best.pt", "new"], "elsewhere/manifest.json: no manifest here"),
        (["best.pt", "new", "--data_dir", "nowhere"], "name the data set that best.pt was trained on with --data_dir"),
        (["model", "new", "--data_dir", "data"], "--data_dir data: not used with a model folder"),
        (["model", "new.csv"], "new.csv: no such file or folder"),
        (["model", "few.csv"], "the input has no event that can be used"),
        (["model", "few.csv", "--minute_column", "hour"], "few.csv: no column 'hour'"),
    ],
)
def test_refusals_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    path = write_checkpoint(Path("best.pt"), data)
    export(path, data, Path("model"))
    saved = Checkpoint.load(path)
    moved = {**saved.options, "data": {**saved.options["data"], "data_dir": "elsewhere"}}
    dataclasses.replace(saved, options=moved).save(path)
    Path("few.csv").write_text("patient_id,minute,variable,value\na,1,v0,1\n")
    capsys.readouterr()
    assert predict.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("seqsetvae-predict: ")
    assert message in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "empty", "few.csv", "model"]


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build(Synthetic(num_patients=40), tmp_path / "data", BuildOptions())
    path = write_checkpoint(tmp_path / "best.pt", tmp_path / "data")
    folder = export(path, tmp_path / "data", tmp_path / "model")
    example = Path(__file__).parents[2] / "examples" / "predict_one_patient.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(folder)])
    capsys.readouterr()
    runpy.run_path(str(example), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("new patient: probability 0.")
    assert len(example.read_text().splitlines()) <= 40
