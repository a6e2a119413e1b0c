from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.schema import UserError
from tests.pages import HOSTILE, Page, check_self_contained
from training.report import MAX_POINTS, Run, main, write_run_report

pytestmark = pytest.mark.usefixtures("drawn")

ROOT = Path(__file__).parents[2]

TRAIN = {
    **{
        "kind": "train",
        "epoch": 0,
        "seconds": 1.0,
        "loss": 2.0,
        "reconstruction": 3.0,
        "kl": 40.0,
        "outcome": 0.7,
    },
    **{"grad_norm": 1.0, "learning_rate": 1e-3, "beta": 0.1, "rss_bytes": 2**30, "patients_per_second": 9.0},
    **{"events_per_second": 900.0, "data_wait_fraction": 0.01, "event_padding_waste": 0.02, "set_padding_waste": 0.2},
}
VALID = {
    **{
        "kind": "valid",
        "epoch": 0,
        "seconds": 1.0,
        "loss": 1.5,
        "reconstruction": 2.5,
        "kl": 30.0,
        "outcome": 0.6,
    },
    **{"auroc": 0.8, "auprc": 0.5, "active_units": 60, "mean_posterior_variance": 0.1, "collapsed": False},
}


def write_run(
    folder: Path,
    *,
    records: list[Mapping[str, Any]],
    summary: Mapping[str, Any] | None = None,
    config: str = "options:\n  seed: 0\n",
    labels: list[int | None] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if labels is not None:
        probability = np.linspace(0.1, 0.9, len(labels))
        table = pa.table({"label": pa.array(labels, pa.int8()), "probability": probability})
        pq.write_table(table, folder / "predictions_test.parquet")
    return folder


def test_run_report_of_nothing(tmp_path: Path) -> None:
    page = Page(write_run_report(tmp_path))
    check_self_contained(page)
    assert page.row(str(tmp_path)) == ["no summary yet: running, or ended early", "–", ""]
    assert page.headings == ["State"]


def test_run_report(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": 10, "epoch": 0, "loss": 2.0, "kl": None, "beta": 0.1, "patients_per_second": 9.0},
        {"kind": "train", "step": 20, "epoch": 0, "loss": None, "kl": float("nan"), "data_wait_fraction": 0.5},
        {"kind": "valid", "step": 20, "epoch": 0, "loss": 1.5, "auroc": 0.8, "active_units": 4},
        {"kind": "event", "step": 20, "message": HOSTILE},
        {"kind": "event", "step": 21, "event": "quarantine", "train": 3},
        {"kind": "train", "loss": 2.0},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"kind": "tra')
    test = {"auroc": 0.81234, "auroc_low": 0.7, "auroc_high": 0.9, "ece": None, "ece_low": None, "ece_high": None}
    profile = {"device": "cpu", "parts": {HOSTILE: {"milliseconds": 3.5}, "step": {"milliseconds": 4}}}
    summary = {"steps": 1234, "stopped_by": HOSTILE, "best": None, "test": test, "profile": profile}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "evaluation_valid.json").write_text(json.dumps({"brier": 0.25}))
    (tmp_path / "config.yaml").write_text(f"note: {HOSTILE}\n", encoding="utf-8")
    (tmp_path / "MODEL_CARD.md").write_text("# Model card")
    predictions = {"label": pa.array([0, 1, 0, 1, None], pa.int8()), "probability": [0.1, 0.9, 0.4, 0.3, 0.5]}
    pq.write_table(pa.table(predictions), tmp_path / "predictions_test.parquet")
    pq.write_table(pa.table(predictions).slice(0, 1), tmp_path / "predictions_valid.parquet")
    (tmp_path / "memory.csv").write_text(
        "seconds,pid,role,rss_bytes,uss_bytes,cuda_allocated_bytes,cuda_reserved_bytes,event\n"
        f'0.0,1,main,100,90,,,"{HOSTILE}"\n0.0,2,child,50,,,,\n0.5,1,main,100,90,10,20,validation\n1.0,1,mai',
        encoding="utf-8",
    )
    page = Page(write_run_report(tmp_path))
    assert page.source == (tmp_path / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert page.row(str(tmp_path))[0] == "finished"
    assert page.links == ["MODEL_CARD.md", "config.yaml", "metrics.jsonl"]
    assert page.row("steps")[0] == "1,234"
    assert page.row("stopped_by")[0] == HOSTILE
    assert page.row("test auroc")[0] == "0.8123 (95 %: 0.7 to 0.9)"
    assert page.row("test ece")[0] == "–"
    assert page.row("evaluation valid brier") == ["0.25"]
    assert page.row("note") == [HOSTILE]
    assert page.row("20") == [HOSTILE]
    assert page.row("21") == ["event quarantine, train 3"]
    assert page.headings == [
        "State",
        "Results",
        "Predictions: test",
        "Predictions: valid",
        "Losses",
        "Quality",
        "Optimisation",
        "Posterior collapse",
        "Throughput",
        "Waiting and padding",
        "Where the time goes",
        "Memory",
        "Messages",
        "Summary",
        "Options",
    ]
    assert len(page.addresses) == 9  # no curves of one class
    assert "4 labelled samples, 2 positive." in page.text
    predicted, losses, *_, bars, memory = page.words
    assert {"Sensitivity over 1 − specificity", "Precision over recall", "Observed over predicted rate"} <= set(
        predicted
    )
    assert "Total loss" in losses
    assert not {"Reconstruction", "KL divergence", "Outcome"} & set(losses)
    assert {"main, resident", "child, resident", "main, reserved on the GPU", "validation"} <= set(memory)
    assert "child, unique" not in memory
    assert {"3.5"} <= set(bars)
    assert "4" not in bars  # the whole step is no part of it


def test_run_report_of_an_evaluation_alone(tmp_path: Path) -> None:
    (tmp_path / "evaluation_test.json").write_text(json.dumps({"split": "test", "auroc": 0.5, "by_length": {"a": 1}}))
    page = Page(write_run_report(tmp_path))
    assert page.row(str(tmp_path))[0] == "evaluated"
    assert page.row("evaluation test auroc") == ["0.5"]
    assert page.row("evaluation test by_length a") == ["1"]


def test_run_report_of_a_run_that_diverged(tmp_path: Path) -> None:
    record = {"kind": "train", "step": 10, "loss": None, "kl": float("inf"), "grad_norm": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    predictions = {"label": pa.array([0, 1], pa.int8()), "probability": [np.nan, 0.5]}
    pq.write_table(pa.table(predictions), tmp_path / "predictions_test.parquet")
    page = Page(write_run_report(tmp_path))
    assert page.addresses == []
    assert page.row("loss") == page.row("kl") == page.row("grad_norm") == ["–"]
    assert page.headings == ["State", "Last logged step", "Predictions: test"]


def test_all_metrics_are_drawn(tmp_path: Path) -> None:
    records = [{**TRAIN, "step": 10}, {**TRAIN, "step": 20}, {**VALID, "step": 20}]
    page = Page(write_run_report(write_run(tmp_path / "run", records=records)))
    check_self_contained(page)
    titles = {
        *("Total loss", "Reconstruction", "KL divergence", "Outcome", "AUROC", "AUPRC", "Learning rate"),
        *("Weight of the KL divergence", "Norm of the gradient", "Active units", "Mean posterior variance"),
        *(
            "Patients per second",
            "Events per second",
            "Waiting for data, %",
            "Padding of events, %",
            "Padding of sets, %",
        ),
        "Resident memory, MiB",
    }
    assert titles <= {word for words in page.words for word in words}
    losses = page.words[0]
    assert losses.count("training") == losses.count("validation") == 1  # one legend


def test_an_objective_that_is_not_used_has_no_panel(tmp_path: Path) -> None:
    unused = {"reconstruction": None, "kl": None}
    without = {name: value for name, value in VALID.items() if name not in ("active_units", "reconstruction", "kl")}
    records = [{**TRAIN, **unused, "step": 10}, {**without, "step": 10}]
    page = Page(write_run_report(write_run(tmp_path / "run", records=records)))
    assert {"Total loss", "Outcome"} <= set(page.words[0])
    assert not {"Reconstruction", "KL divergence", "Active units"} & {word for words in page.words for word in words}


def test_curves_by_hand(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": 2.0 * step} for step in range(2 * MAX_POINTS)
    ]
    records += [{"kind": "valid", "step": 1, "loss": 7}, {"kind": "valid", "step": 2, "loss": None}]
    records += [
        {"kind": "valid", "step": 3},
        {"kind": "valid", "loss": 1.0},
        {"kind": "valid", "step": 4, "loss": 10**400},
    ]
    run = Run(write_run(tmp_path / "run", records=records), "")
    assert run.curve("valid", "loss").tolist() == [[1, 7]]
    assert run.curve("valid", "kl").shape == (0, 2)
    steps = np.arange(0.5, 2 * MAX_POINTS, 2)  # means of two neighbours
    assert run.curve("train", "loss").tolist() == np.stack([steps, 2 * steps], axis=1).tolist()


def test_a_long_run_has_a_small_report(tmp_path: Path) -> None:
    records = [{**TRAIN, "step": step, "loss": step % 7} for step in range(20_000)]
    page = Page(write_run_report(write_run(tmp_path / "run", records=records)))
    assert len(page.source) < 1_500_000


def test_several_runs_are_laid_over_one_another(tmp_path: Path) -> None:
    records = [{**TRAIN, "step": 10}, {**VALID, "step": 10}]
    config = "options:\n  seed: {}\n  width: 64\n  learning_rate: {}\n"
    test = {"auroc": 0.8, "auroc_low": 0.7, "auroc_high": 0.9}
    first = write_run(
        tmp_path / "first $x$",
        records=[*records, {"kind": "event", "step": 5, "message": "saved"}],
        summary={"steps": 10, "seconds": 3.5, "test": test, "more": "here"},
        config=config.format(0, 0.1),
        labels=[0, 0, 1, 1, None],
    )
    second = write_run(tmp_path / HOSTILE.replace("/", "|"), records=records[:1], config=config.format(1, 0.1))
    (second / "memory.csv").write_text("not read")
    assert write_run_report(first, second) == first / "comparison.html"
    assert not (first / "report.html").exists()
    page = Page(first / "comparison.html")
    check_self_contained(page)
    assert page.row("run") == ["folder", "state", "last step logged", "files"]
    assert page.row("1: first $x$")[:3] == [str(first), "finished", "10"]
    assert page.row(f"2: {second.name}")[:3] == [str(second), "no summary yet: running, or ended early", "10"]
    assert "config.yaml" in page.links
    assert any(link.startswith("../%3C") and link.endswith("/metrics.jsonl") for link in page.links)
    assert page.row("test auroc")[:2] == ["0.8 (95 %: 0.7 to 0.9)", "–"]
    assert page.row("more") == ["here", "–"]
    assert page.row("options seed") == ["0", "1"]
    assert not any(row and row[0] in ("options width", "options learning_rate") for row in page.rows)
    labels = ["1: first $x$", f"2: {second.name}"[:37] + "..."]
    losses = page.words[1]
    for label in (f"{labels[0]} training", f"{labels[0]} validation", f"{labels[1]} training"):
        assert label in losses
    assert f"{labels[1]} validation" not in losses
    assert losses.count("Total loss") == 1


@given(name=st.text(max_size=400), value=st.text(max_size=400))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_of_a_run_is_shown_and_breaks_nothing(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({f"{name} end": value}))
    page = Page(write_run_report(tmp_path))
    check_self_contained(page)

    def shown(text: str) -> str:
        cut = text if len(text) <= 300 else f"{text[:299]}…"
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", cut)

    if not f"{name} end".endswith(("_low", "_high")):
        assert page.row(shown(f"{name} end")) == [shown(value)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "not JSON\n"),
        ("summary.json", "[]"),
        ("summary.json", '{"test": '),
        ("evaluation_test.json", "7"),
        ("config.yaml", "- a list"),
        ("config.yaml", "options: ["),
        ("memory.csv", "seconds,event\nsoon,start\n"),
        ("memory.csv", "when,event\n1.0,start\n"),
        ("predictions_test.parquet", "PAR1"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        write_run_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_a_private_page_without_global_state(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=[{**TRAIN, "step": 1}], labels=[0, 1, 0, 1])
    command = [sys.executable, "-W", "error", "-m", "training.report", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment())
    assert done.stdout == "run/report.html\n"
    assert done.stderr == ""
    assert stat.S_IMODE((run / "report.html").stat().st_mode) == 0o600
    program = (
        "import sys, pathlib; from training.report import write_run_report\n"
        "assert not {'matplotlib', 'sklearn', 'torch'} & set(sys.modules)\n"
        "write_run_report(pathlib.Path('run'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=tmp_path, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_page_is_where_output_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "runs" / name, records=[{**TRAIN, "step": 1}]) for name in ("a", "b")]
    page = tmp_path / "all.html"
    assert main([*map(str, runs), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "runs/a/config.yaml" in Page(page).links
    assert main([str(runs[0]), "--output", str(page)]) == 0
    assert "Run report" in Page(page).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN; see --help"),
        (["none"], "none: not the output of a run; give the --output_dir of train.py"),
        (["data"], "data: not the output of a run; give the --output_dir of train.py"),
        (["run", "data"], "data: not the output of a run; give the --output_dir of train.py"),
        (["run", "--step", "1"], "unrecognized arguments: --step 1; see --help"),
        (["run", "--output", "none/page.html"], "No such file or directory"),
        (["damaged"], "metrics.jsonl: line 1 is not a JSON object; move the file away"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", records=[])
    write_run(tmp_path / "damaged", records=[])
    (tmp_path / "damaged" / "metrics.jsonl").write_text("no\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "summary.json").write_text("{}")
    (tmp_path / "data" / "report.html").write_text("of the data")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("training.report: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert (tmp_path / "data" / "report.html").read_text() == "of the data"
    assert not list(tmp_path.glob("*run*/*.html"))
