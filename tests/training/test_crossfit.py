"""Cross-fitting: out-of-fold predictions, the final models as one checkpoint, and runs that are killed on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import train
import training.card
import training.checkpoint
import training.run_files
from pipeline.dataset.manifest import Manifest
from pipeline.schema import FIRST_CODE
from tests.training.runs import (
    assert_same,
    read_folder,
    read_metrics,
    read_summary,
    run,
    start,
    weights,
    write_tiny_data,
)
from training import crossfit
from training.calibration import LEAST_SLOPE, calibration_of
from training.checkpoint import Checkpoint, load_model

FLAGS = ["--folds", "2", "--final_seeds", "2", "--max_epochs", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossfit, "write_run_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossfit, "write_run_report", lambda folder: folder / "report.html")
        assert run(data, out, *FLAGS) == 0
    return out


def patients_of(data: Path, *splits: str) -> list[str]:
    rows = pq.read_table(data / "tasks" / "default.parquet").to_pylist()
    return sorted(row["patient_id"] for row in rows if row["split"] in splits)


def test_everyone_of_train_and_valid_is_predicted_once(data: Path, finished: Path) -> None:
    table = pq.read_table(finished / "predictions_out_of_fold.parquet")
    assert table["patient_id"].to_pylist() == patients_of(data, "train", "valid")
    of_test = pq.read_table(finished / "predictions_test.parquet")
    assert of_test["patient_id"].to_pylist() == patients_of(data, "test")


def test_the_epoch_of_the_least_pooled_loss_is_where_final_models_stop(finished: Path) -> None:
    summary = read_summary(finished)["out_of_fold"]
    curve = []
    for epoch in range(2):
        parts = [
            pq.read_table(
                finished / "members" / f"repeat_0_fold_{fold}" / "out_of_fold" / f"default_epoch_{epoch}.parquet"
            )
            for fold in range(2)
        ]
        label, p = (np.concatenate([part[name].to_numpy() for part in parts]) for name in ("label", "probability"))
        known = np.isfinite(label)
        y, logit = label[known], np.log(p / (1 - p))[known, None]
        fitted = LogisticRegression(C=np.inf, tol=1e-9, max_iter=1000).fit(logit, y)
        if fitted.coef_[0, 0] < LEAST_SLOPE:  # predictions of patients at random say nothing
            fitted.coef_[:] = LEAST_SLOPE
            fitted.intercept_ = np.array(
                [calibration_of(y, 1 / (1 + np.exp(-LEAST_SLOPE * logit[:, 0])))(y * 0 + 1)[1]]
            )
        curve.append(log_loss(y, fitted.predict_proba(logit)[:, 1]))
    assert summary["loss_by_epoch"] == pytest.approx(curve, abs=1e-6)
    assert summary["epochs"] == int(np.argmin(curve)) + 1
    for seed in range(2):
        own = read_summary(finished / "members" / f"final_{seed}")
        assert own["best"]["epoch"] + 1 == summary["epochs"]


def test_the_checkpoint_averages_the_final_models_recalibrated(data: Path, finished: Path, tmp_path: Path) -> None:
    fingerprint = Manifest.load(data).vocabulary_fingerprint
    joined = Checkpoint.load(finished / "checkpoints" / "best.pt")
    assert len(joined.state["members"]) == 2
    for seed, own in enumerate(joined.state["members"]):
        assert_same(own, weights(finished / "members" / f"final_{seed}", "last", "ema_model"))
    assert load_model(finished / "checkpoints" / "best.pt", fingerprint).config.outcomes[0].calibration
    answers = []
    for name, flags in {"with": [], "without": ["--no-recalibrate"]}.items():
        flags += ["--evaluate", str(finished / "checkpoints" / "best.pt")]
        assert run(data, tmp_path / name, *flags) == 0
        answers.append(pq.read_table(tmp_path / name / "predictions_test.parquet")["probability"].to_numpy())
    at_end = pq.read_table(finished / "predictions_test.parquet")["probability"].to_numpy()
    assert answers[0] == pytest.approx(at_end, abs=1e-6)
    slope, _, intercept = joined.config["outcomes"][0]["calibration"]
    logit = np.log(answers[1] / (1 - answers[1]))
    assert answers[0] == pytest.approx(1 / (1 + np.exp(-(slope * logit + intercept))), abs=1e-5)


def test_the_test_split_has_decisions_and_the_coverage_of_conformal_sets(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary["test"]["conformal"].keys() == {"0.05", "0.1", "0.2"}
    assert "conformal" not in summary["out_of_fold"], "they were fitted to these predictions"
    assert summary["test"]["net_benefit"].keys() == summary["out_of_fold"]["net_benefit"].keys()
    card = (finished / "MODEL_CARD.md").read_text()
    for words in ("train **and** valid", "the models of 2 folds", "| 0.05 |", "alerts per 100", "may miss"):
        assert words in card


def test_a_finished_run_is_not_changed_and_more_seeds_are_added(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_folder(finished)
    assert run(data, finished, *FLAGS, "--resume") == 0
    assert read_folder(finished) == before
    assert "cross-fitting is finished" in capsys.readouterr().err
    out = tmp_path / "more"
    assert run(data, out, "--folds", "0", "--final_seeds", "2", "--max_epochs", "1") == 0
    assert read_summary(out)["out_of_fold"] is None
    assert run(data, out, "--folds", "0", "--final_seeds", "3", "--max_epochs", "1", "--resume") == 0
    assert len(Checkpoint.load(out / "checkpoints" / "best.pt").state["members"]) == 3
    assert not Checkpoint.load(out / "checkpoints" / "best.pt").config["outcomes"][0]["calibration"]


def test_subgroups_of_a_checkpoint_add_up(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variable = pq.read_table(data / "vocabulary.parquet")["variable"].to_pylist()[FIRST_CODE]
    flags = ["--evaluate", str(finished / "checkpoints" / "best.pt"), "--subgroups"]
    assert run(data, tmp_path, *flags, f"{variable}=0") == 0
    found = json.loads((tmp_path / "evaluation_test.json").read_text())
    groups = found["subgroups"][variable]
    assert sum(group["num_labelled"] for group in groups.values()) == found["num_labelled"]
    assert set(groups) <= {"below 0", "from 0", "not recorded"}
    for words, bad in {"--subgroups 'Age=2,1'": "Age=2,1", "have no such variable": "Nothing"}.items():
        assert run(data, tmp_path / "refused", *flags, bad) == 2
        assert words in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("number", [15])
def test_a_kill_changes_nothing(data: Path, finished: Path, tmp_path: Path, number: int) -> None:
    written = 0
    with pytest.MonkeyPatch.context() as patch:
        write = train.write_atomically

        def counted(path: Path, content: bytes) -> None:
            nonlocal written
            if written == number:
                raise Killed
            write(path, content)
            written += 1

        for module in (train, training.card, training.checkpoint, training.run_files, crossfit):
            patch.setattr(module, "write_atomically", counted)
        with pytest.raises(Killed):
            run(data, tmp_path, *FLAGS)
    assert run(data, tmp_path, *FLAGS, "--resume") == 0
    for name in ("predictions_out_of_fold.parquet", "predictions_test.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(finished / name))
    assert read_summary(tmp_path)["out_of_fold"] == read_summary(finished)["out_of_fold"]
    lines = read_metrics(tmp_path / "members" / "final_1")
    assert [line["step"] for line in lines] == [line["step"] for line in read_metrics(finished / "members" / "final_1")]


@pytest.mark.usefixtures("forked")
def test_models_side_by_side_are_those_of_one_after_another(data: Path, finished: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, *FLAGS, "--parallel_models", "2") == 0
    for member in sorted(path.name for path in (finished / "members").iterdir()):
        there, here = (weights(out / "members" / member, "last") for out in (tmp_path, finished))
        assert_same(there, here)
    for name in ("predictions_out_of_fold.parquet", "predictions_test.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(finished / name))
    assert read_summary(tmp_path)["out_of_fold"] == read_summary(finished)["out_of_fold"]


def test_what_cannot_be_joined_is_refused_in_a_line(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_folder(finished)
    best = str(finished / "checkpoints" / "best.pt")
    refused = {
        "holds cross-fitting": (finished, FLAGS),
        "--folds 3 cannot be combined": (finished, ["--folds", "3", "--resume"]),
        "--folds 1": (tmp_path / "a", ["--folds", "1"]),
        "predicts nothing": (tmp_path / "a", ["--folds", "2", "--objective", "pretrain"]),
        "averages several models": (tmp_path / "a", ["--init_from", best]),
        "--parallel_models is for the models of": (tmp_path / "a", ["--parallel_models", "2"]),
        "leave --devices": (tmp_path / "a", [*FLAGS, "--parallel_models", "2", "--devices", "2"]),
    }
    for words, (out, flags) in refused.items():
        assert run(data, out, *flags) == 2
        assert words in capsys.readouterr().err
    assert read_folder(finished) == before
    assert not (tmp_path / "a").exists()
    assert run(data, tmp_path / "one", "--max_epochs", "1") == 0
    assert run(data, tmp_path / "one", *FLAGS, "--resume") == 2
    assert "holds a run of one model" in capsys.readouterr().err


def test_two_processes_find_what_one_finds(data: Path, finished: Path, tmp_path: Path) -> None:
    """After an epoch of two: all that happens after it is no longer of one model."""
    flags = [*FLAGS, "--final_seeds", "1", "--stop_after", "1"]
    process = start(data, tmp_path, *flags, "--devices", "2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (tmp_path / "checkpoints" / "best.pt").exists()
    for fold in range(2):
        place = f"members/repeat_0_fold_{fold}/out_of_fold/default_epoch_0.parquet"
        there, here = (pq.read_table(out / place) for out in (tmp_path, finished))
        assert there["patient_id"].equals(here["patient_id"])
        assert there["probability"].to_numpy() == pytest.approx(here["probability"].to_numpy(), abs=1e-4)


def test_several_tasks_of_several_kinds(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    rows = [f"{patient},{number}.5" for number, patient in enumerate(patients_of(data, "train", "valid", "test"))]
    (tmp_path / "stay.csv").write_text("\n".join(["patient_id,label", *rows]))
    from pipeline.tasks import main as tasks

    assert tasks(["add", str(data), "--name", "stay", "--labels", str(tmp_path / "stay.csv")]) == 0
    out = tmp_path / "run"
    assert run(data, out, *FLAGS, "--task", "default,stay", "--max_epochs", "1") == 0
    found = read_summary(out)["out_of_fold"]["tasks"]
    assert len(found["default"]["calibration"]) == 3
    assert found["stay"]["calibration"] == []
    assert (out / "predictions_out_of_fold_stay.parquet").exists()
