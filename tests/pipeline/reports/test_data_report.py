from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.schemas import INDEX_SCHEMA, VOCABULARY_SCHEMA
from pipeline.dataset.shards import write_shard
from pipeline.reports.data_report import MAX_VARIABLES, draw_histogram, write_data_report
from pipeline.reports.lengths import Lengths
from pipeline.schema import UserError
from pipeline.storage.files import file_sha256
from tests.data_dirs import Patient, add_task, shard_table
from tests.pages import HOSTILE, Page, check_self_contained

pytestmark = pytest.mark.usefixtures("drawn")


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
        "shard": [f"{name}/0{suffix}" for name in split],
        "position": range(num_patients),
        "num_events": num_events,
        "num_sets": [max(1, number // 2) for number in num_events],
        "max_set_size": [2] * num_patients,
        "time_origin": [None] * num_patients,
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
    if num_patients:
        add_task(directory, [(patient, None, patient.label) for some in patients.values() for patient in some])


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
    assert page.row("train") == ["4", "80.0%", "535", "1,070"]
    assert page.row("test") == ["1", "20.0%", "40", "80"]
    tasks = [row[1:] for row in page.rows if row[0] == "default"]
    assert tasks[0] == ["binary", "train", "4", "4", "1", "3", "66.67% positive", "0", "30", "–"]
    assert tasks[1] == ["binary", "test", "1", "1", "1", "0", "none", "0", "80", "–"]
    assert page.row("duplicate") == ["3", "42.9%"]
    assert "7 rows of 1,157 (0.605%)." in page.text
    # Of nine values in ten events: -2, -0.25, 0, 0, 0, 0.5, 1, 2, 3, each times 2 and plus 0.5.
    assert page.row("Heart rate") == ["3", "3", "50.0%", "0.5", "2", "-3.5", "0.5", "6.5", ""]
    assert page.spreads == [[25.0, 25.0, 50.0, 87.5, 87.5]]  # as parts of -4 to 4
    assert page.row(HOSTILE, 1) == ["2", "2", "33.3%", "0.5", "2", "–", "–", "–", "–"]
    assert "1 of 1 shards of the train split, 1,070 events" in page.text
    wastes = [row[1:] for row in page.rows if row[0] == "at random"]
    assert [row[0] for row in wastes] == ["73.2%", "73.2%"]  # one batch: 1 - 1070 / 4000, 1 - 535 / 2000
    sorted_ = [row[1:] for row in page.rows if row[0] == "sorted by events"]
    assert sorted_[0][0] == "73.2%"
    assert page.row("events_in") == ["1,157"]
    assert [row[0] for row in page.rows].count(HOSTILE) == 3  # a reject and a variable, known and not, as they are
    (words,) = page.words
    for title in ("Events of a patient: median 40", "Sets of a patient: median 20", "Events of a set: median 2"):
        assert title in words


def test_data_report_of_no_patients(tmp_path: Path) -> None:
    write_data(tmp_path, num_events=[], split=[], label=[], variables=[])
    page = Page(write_data_report(tmp_path))
    assert page.row("Patients") == ["0"]
    assert page.addresses == []
    assert "There are no patients." in page.text


def test_data_report_of_equal_patients_and_many_variables(tmp_path: Path) -> None:
    many = [f"variable {number}" for number in range(MAX_VARIABLES + 5)]
    write_data(tmp_path, num_events=[7] * 9, split=["valid"] * 9, label=[0] * 9, variables=many, suffix=".tar")
    page = Page(write_data_report(tmp_path))
    assert [row[-4] for row in page.rows if row[0] == "default"] == ["0.00% positive"]
    assert page.row(many[-1])[-4:-1] == ["0.5"] * 3
    assert "variable 4" not in [row[0] for row in page.rows]  # counts rise with the number: the last five are dropped
    assert "and 5 more" in page.text
    assert "Rejected rows" in page.headings
    assert "None." in page.text
    assert len(page.source) < 1_500_000


def test_names_of_any_kind_leave_the_page_whole(tmp_path: Path) -> None:
    names = [
        "\x00\x1b[31m\r\n",
        "\u202egnidaeh\u202c",
        "x" * 100_000,
        "$\\frac{",
    ]
    write_data(tmp_path, num_events=[9] * 3, split=["train"] * 3, label=[0] * 3, variables=["", "unknown", *names])
    summary = {
        "events_in": 27,
        "unknown_variables": {f"{name}{number}": 1 for number in range(400) for name in [*names, "\ud800"]},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(write_data_report(tmp_path))
    check_self_contained(page)
    assert page.row("\ufffd\ufffd[31m\ufffd\n", 0)[0] == "2"
    assert page.row("\u202egnidaeh\u202c", 0)[0] == "3"
    assert page.row("x" * 299 + "…", 0)[0] == "4"
    assert "and 1,700 more in summary.json" in page.text
    assert len(page.source) < 1_500_000


def test_only_so_many_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path, num_events=[3, 5], split=["train"] * 2, label=[0, 1], variables=["a", "b", "c"])
    manifest = Manifest.load(tmp_path)
    replace(manifest, splits={"train": manifest.splits["train"] * 4}).save(tmp_path)
    monkeypatch.setattr("pipeline.reports.data_report.MAX_EVENTS_READ", 9)
    assert "2 of 4 shards of the train split, 16 events" in Page(write_data_report(tmp_path)).text


def test_padding_of_many_patients_is_that_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reports.data_report.MAX_PATIENTS_PLANNED", 2)
    write_data(tmp_path, num_events=[4, 1, 8, 1], split=["train"] * 4, label=[None] * 4, variables=["a", "b", "c"])
    page = Page(write_data_report(tmp_path))
    assert "Computed for one patient in 2;" in page.text
    assert [row[1] for row in page.rows if row[0] == "at random"] == ["25.0%", "25.0%"]  # 4 and 8, 2 and 4


@pytest.mark.parametrize(
    ("values", "heights", "scale"),
    [
        ([1, 1, 2, 5], [1.0, 0.5, 0.5], "linear"),
        ([7] * 9, [1.0], "linear"),
        ([100, 101, 180, 180], [1.0, 1.0], "linear"),  # bars of 3, so both ends hold two
        ([1, 1, 1, 31], [1.0, 1 / 3], "log"),
        ([3, 3_000_000], [1.0, 1.0], "log"),
    ],
)
def test_histogram(values: list[int], heights: list[float], scale: str) -> None:
    axis = Figure().add_subplot()
    draw_histogram(axis, lengths=Lengths(np.array(values, np.int32)), counted="patients")
    (bars,) = axis.patches
    count, edges, _ = bars.get_data()
    assert count[count > 0] / count.max() == pytest.approx(heights)
    assert count.sum() == len(values)
    assert edges[0] < min(values) <= max(values) < edges[-1]
    assert (np.diff(edges) >= 1).all()
    assert len(count) <= 40
    assert axis.get_xscale() == scale
    assert axis.get_ylabel() == "patients"


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


def test_a_report_has_no_global_state_and_is_drawn_late(tmp_path: Path) -> None:
    write_data(tmp_path, num_events=[3], split=["train"], label=[0], variables=["a"])
    program = (
        "import sys, pathlib; from pipeline.reports.data_report import write_data_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "write_data_report(pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], check=True)
