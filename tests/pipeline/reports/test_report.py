from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, VOCABULARY_SCHEMA
from pipeline.dataset.shards import write_shard
from pipeline.reports.data_report import MAX_VARIABLES, write_data_report
from pipeline.reports.page import histogram
from pipeline.schema import UserError
from pipeline.storage.files import file_sha256
from tests.data_dirs import Patient, shard_table
from training.report import write_run_report

HOSTILE = "</td></pre><script>alert('$x_{$')</script>\U0001f600&amp;"


class Page(HTMLParser):
    """What a browser would see: elements in order, text by table cell, and whether all that was opened was closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.spreads: list[list[float]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if ("class", "spread") in attributes:
            (middle, _), (low, high), (least, greatest) = re.findall(
                r"([\d.]+)% ([\d.]+)%,", dict(attributes)["style"] or ""
            )
            self.spreads.append([float(least), float(low), float(middle) + 0.5, float(high), float(greatest)])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self._open and self._open[-1] == "h2":
            self.headings[-1] += data

    def row(self, first: str, place: int = -1) -> list[str]:
        """The cells after the first of the only row that begins so, or of one of several."""
        rows = [row for row in self.rows if row[0] == first]
        assert place >= 0 or len(rows) == 1
        return rows[place][1:]


def check_self_contained(page: Page) -> None:
    assert "script" not in page.elements
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not re.search(r"@import|url\(", page.source)


def write_data(
    directory: Path,
    *,
    num_events: list[int],
    split: list[str],
    label: list[int | None],
    variables: list[str],
    values: tuple[float | None, ...] = (0.0,),
    suffix: str = ".parquet",
) -> None:
    """A data set with a shard a split; a patient's sets have two events but for the last, all of the last variable.

    Args:
        values: scaled, of the events of each patient, again and again.
    """
    num_patients, num_codes = len(num_events), len(variables)
    patients: dict[str, list[Patient]] = {name: [] for name in split}
    for number in np.argsort(num_events, kind="stable").tolist():
        events = [(num_codes - 1, values[at % len(values)]) for at in range(num_events[number])]
        starts = range(0, 2 * max(1, num_events[number] // 2), 2)
        sets = [(float(at), events[at : None if at == starts[-1] else at + 2]) for at in starts]
        patients[split[number]].append(Patient(patient_id=str(number), label=label[number], sets=sets))
    index = {
        "patient_id": [str(number) for number in range(num_patients)],
        "split": split,
        "label": label,
        "shard": [f"{name}/0{suffix}" for name in split],
        "position": range(num_patients),
        "num_events": num_events,
        "num_sets": [max(1, number // 2) for number in num_events],
        "max_set_size": [2] * num_patients,
    }
    vocabulary = {
        "code": range(num_codes),
        "variable": variables,
        "count": range(num_codes),
        **dict.fromkeys(("low", "high", "description"), [None] * num_codes),
        "mean": [0.5] * num_codes,
        "std": [2.0] * num_codes,
    }
    directory.mkdir(exist_ok=True)
    pq.write_table(pa.table(index, schema=INDEX_SCHEMA), directory / "index.parquet")
    pq.write_table(pa.table(vocabulary, schema=VOCABULARY_SCHEMA), directory / "vocabulary.parquet")
    Manifest(
        splits={
            name: [write_shard(shard_table(some), directory, f"{name}/0{suffix}")] for name, some in patients.items()
        },
        files={name: file_sha256(directory / name) for name in ("index.parquet", "vocabulary.parquet")},
        vocabulary_fingerprint="0",
        num_codes=num_codes,
        embedding_dim=None,
        options={"input": HOSTILE},
        fingerprint="0",
    ).save(directory)


def test_data_report(tmp_path: Path) -> None:
    write_data(
        tmp_path,
        num_events=[10, 1000, 20, 40, 80],
        split=["train", "train", "train", "train", "test"],
        label=[0, 1, 1, None, None],
        variables=["", "unknown", HOSTILE, "Heart rate"],
        values=(3.0, None, -2.0, 0.5, 1.0, -0.25, 2.0, 0.0, 0.0, 0.0),
    )
    summary = {"events_in": 1157, "rejects": {"duplicate": 3, HOSTILE: 4}, "unknown_variables": {HOSTILE: 2}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert write_data_report(tmp_path) == tmp_path / "report.html"

    page = Page(tmp_path / "report.html")
    check_self_contained(page)
    assert page.row("Patients") == ["5"]
    assert page.row("Sets") == ["575"]
    assert page.row("Events") == ["1,150"]
    assert page.row("Rejected rows") == ["7"]
    size = sum(path.stat().st_size for path in tmp_path.glob("*/0.parquet"))
    assert page.row("MiB of shards") == [f"{size / 2**20:,.4g}"]
    assert page.row("train") == ["4", "80.0%", "535", "1,070", "3", "2", "66.7%"]
    assert page.row("test") == ["1", "20.0%", "40", "80", "0", "0", "–"]
    assert page.row("duplicate") == ["3", "42.9%"]
    assert "7 rows of 1,157 (0.605%)." in page.text
    # Of nine values in ten events: -2, -0.25, 0, 0, 0, 0.5, 1, 2, 3, each times 2 and plus 0.5.
    assert page.row("Heart rate") == ["3", "3", "50.0%", "0.5", "2", "-3.5", "0.5", "6.5", ""]
    assert page.spreads == [[25.0, 25.0, 50.0, 87.5, 87.5]]  # as parts of -4 to 4
    assert page.row(HOSTILE, 1) == ["2", "2", "33.3%", "0.5", "2", "–", "–", "–", "–"]
    assert "1 of 1 shards of the train split, 1,070 events" in page.text
    wastes = [row[1:] for row in page.rows if row[0] == "at random"]
    assert [row[0] for row in wastes] == ["73.2%", "73.2%"]  # one batch: 1 - 1070 / 4000, 1 - 535 / 2000
    assert page.row("events_in") == ["1,157"]
    assert [row[0] for row in page.rows].count(HOSTILE) == 3  # a reject and a variable, known and not, as they are
    assert len(page.addresses) == 5


def test_data_report_of_no_patients(tmp_path: Path) -> None:
    write_data(tmp_path, num_events=[], split=[], label=[], variables=[])
    page = Page(write_data_report(tmp_path))
    assert page.row("Patients") == ["0"]
    assert page.addresses == []
    assert "Events of a patient: none" in page.text


def test_data_report_of_equal_patients_and_many_variables(tmp_path: Path) -> None:
    many = [f"variable {number}" for number in range(MAX_VARIABLES + 5)]
    write_data(tmp_path, num_events=[7] * 9, split=["valid"] * 9, label=[0] * 9, variables=many, suffix=".tar")
    page = Page(write_data_report(tmp_path))
    assert page.row("valid")[-1] == "0.0%"
    assert page.row(many[-1])[-4:-1] == ["0.5"] * 3
    assert "variable 4" not in [row[0] for row in page.rows]  # counts rise with the number: the last five are dropped
    assert "and 5 more" in page.text
    assert "Rejected rows" in page.headings
    assert "None." in page.text


def test_only_so_many_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path, num_events=[3, 5], split=["train"] * 2, label=[0, 1], variables=["a", "b", "c"])
    manifest = Manifest.load(tmp_path)
    replace(manifest, splits={"train": manifest.splits["train"] * 4}).save(tmp_path)
    monkeypatch.setattr("pipeline.reports.data_report.EVENTS_LOOKED_AT", 9)
    assert "2 of 4 shards of the train split, 16 events" in Page(write_data_report(tmp_path)).text


def test_padding_of_many_patients_is_that_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reports.data_report.PATIENTS_PLANNED", 2)
    write_data(tmp_path, num_events=[4, 1, 8, 1], split=["train"] * 4, label=[None] * 4, variables=["a", "b", "c"])
    page = Page(write_data_report(tmp_path))
    assert "Of one patient in 2" in page.text
    assert [row[1] for row in page.rows if row[0] == "at random"] == ["25.0%", "25.0%"]  # 4 and 8, 2 and 4


@pytest.mark.parametrize(
    ("values", "heights", "ticks"),
    [
        ([1, 1, 2, 5], [1.0, 0.5, 0.5], ["1", "2", "3", "4", "5"]),
        ([7] * 9, [1.0], ["7"]),
        ([100, 101, 180, 180], [1.0, 1.0], ["100", "120", "140", "160", "180"]),  # bars of 3, so both ends hold two
        ([1, 1, 1, 31], [1.0, 1 / 3], ["1", "2", "5", "10", "20"]),
        ([3, 3_000_000], [1.0, 1.0], ["10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
    ],
)
def test_histogram(values: list[int], heights: list[float], ticks: list[str]) -> None:
    image = histogram("Values", np.array(values, np.int32), "patients")
    svg = base64.b64decode(image.split("base64,")[1].rstrip('">')).decode()
    bars = re.findall(r"M([\d.]+) 160V([\d.]+)H([\d.]+)V160z", svg)
    assert [(160 - float(y)) / 130 for _, y, _ in bars] == pytest.approx(heights, abs=1e-3)
    assert float(bars[0][0]) == 52
    assert float(bars[-1][2]) <= 440
    assert re.findall(r'text-anchor="middle">([\d,]+)<', svg) == ticks


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    write_data(tmp_path, num_events=[3, 5], split=["train"] * 2, label=[0, 1], variables=["a"])
    first = write_data_report(tmp_path).read_bytes()
    assert write_data_report(tmp_path).read_bytes() == first


def test_damaged_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json"):
        write_data_report(tmp_path)
    write_data(tmp_path, num_events=[3], split=["train"], label=[0], variables=["a"])
    (tmp_path / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"index\.parquet"):
        write_data_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_run_report_of_nothing(tmp_path: Path) -> None:
    page = Page(write_run_report(tmp_path))
    assert page.row("state") == ["no summary yet: running, or ended early"]
    assert page.headings == []


def test_run_report(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": 10, "epoch": 0, "loss": 2.0, "kl": None, "beta": 0.1, "patients_per_second": 9.0},
        {"kind": "train", "step": 20, "epoch": 0, "loss": None, "kl": float("nan"), "kl_level_1": 3.0},
        {"kind": "valid", "step": 20, "epoch": 0, "loss": 1.5, "auroc": 0.8, "active_units_1": 4},
        {"kind": "event", "step": 20, "message": HOSTILE},
        {"kind": "train", "loss": 2.0},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"kind": "tra')
    test = {"auroc": 0.81234, "auroc_low": 0.7, "auroc_high": 0.9, "ece": None, "ece_low": None, "ece_high": None}
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 1234, "stopped_by": HOSTILE, "test": test}))
    (tmp_path / "evaluation_valid.json").write_text(json.dumps({"brier": 0.25}))
    (tmp_path / "config.yaml").write_text(f"note: {HOSTILE}\n", encoding="utf-8")
    predictions = {"label": pa.array([0, 1, 0, 1, None], pa.int8()), "probability": [0.1, 0.9, 0.4, 0.3, 0.5]}
    pq.write_table(pa.table(predictions), tmp_path / "predictions_test.parquet")
    pq.write_table(pa.table(predictions).slice(0, 1), tmp_path / "predictions_valid.parquet")
    (tmp_path / "memory.csv").write_text(
        "seconds,pid,role,rss_bytes,uss_bytes,cuda_allocated_bytes,cuda_reserved_bytes,event\n"
        f'0.0,1,main,100,90,,,"{HOSTILE}"\n0.0,2,child,50,,,,\n0.5,1,main,100,90,10,20,validation\n1.0,1,mai',
        encoding="utf-8",
    )
    page = Page(write_run_report(tmp_path))
    check_self_contained(page)
    assert page.row("steps") == ["1,234"]
    assert page.row("stopped_by") == [HOSTILE]
    assert page.row("test auroc") == ["0.8123 (95 %: 0.7 to 0.9)"]
    assert page.row("test ece") == ["–"]
    assert page.row("brier") == ["0.25"]
    assert page.row("20") == [HOSTILE]
    assert page.headings == [
        "Evaluation: valid",
        "Predictions: test",
        "Predictions: valid",
        "Losses",
        "Validation",
        "Optimisation",
        "Throughput",
        "Posterior collapse",
        "Memory: memory",
        "Events of the run",
        "Summary",
        "Configuration",
    ]
    assert len(page.addresses) == 7  # no curves of one class
    assert "4 labelled patients, 2 positive." in page.text
    assert f"note: {HOSTILE}" in page.text


def test_run_report_of_a_run_that_diverged(tmp_path: Path) -> None:
    record = {"kind": "train", "step": 10, "loss": None, "kl": float("inf"), "grad_norm": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    predictions = {"label": pa.array([0, 1], pa.int8()), "probability": [np.nan, 0.5]}
    pq.write_table(pa.table(predictions), tmp_path / "predictions_test.parquet")
    page = Page(write_run_report(tmp_path))
    assert page.addresses == []
    assert page.row("loss") == page.row("kl") == page.row("grad_norm") == ["–"]
    assert page.headings == ["Predictions: test"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "not JSON\n"),
        ("summary.json", "[]"),
        ("summary.json", '{"test": '),
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
