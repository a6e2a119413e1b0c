from __future__ import annotations

import gzip
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.prepare.sources.label_files import LabelColumns, LabelKind
from pipeline.prepare.sources.labels import read_labels
from pipeline.prepare.sources.meds import Meds
from pipeline.prepare.sources.table import Table
from pipeline.schema import UserError
from tests.pipeline.prepare.sources.conftest import Tabulate


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_labels_are_zero_one_or_none(tmp_path: Path, tabulate: Tabulate) -> None:
    text = "patient_id,label\na,0\nb,1.0\nc,\nd,-1\ne,TRUE\nf, 0 \ng,nan\nh,\nh,1\nh,1\n,1\n"
    expected = {"a": 0, "b": 1, "c": None, "d": None, "e": 1, "f": 0, "g": None, "h": 1}
    labels = read_labels(write(tmp_path / "1.csv", text))
    assert labels.time_column is None
    assert dict(tabulate(labels).iter_rows()) == expected
    frame = pl.DataFrame({"subject_id": [1, 2, 3], "boolean_value": [True, False, None]})
    frame.write_parquet(tmp_path / "1.parquet")
    assert tabulate(read_labels(tmp_path / "1.parquet", LabelColumns(label="boolean_value"))).rows() == [
        ("1", 1),
        ("2", 0),
        ("3", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient_id,label\na,0\na,1\n", "rows 1 to 2 give one sample two labels"),
        ("patient_id,label\na,2\n", "row 1, column 'label': a label is 0, 1"),
        ("patient_id,label\na,yes\nb,1\n", "row 1, column 'label': a label is 0, 1"),
        ("patient_id,label\na,yes\n", "column 'label' has fewer than two classes"),
        ("patient_id,died\na,1\n", "no column 'label' or .*--label_column"),
        ("who,label\na,1\n", "no column 'patient_id' or"),
        ("patient_id,time,label\na,1,1\n,1,1\n", "row 2 has no patient_id"),
        ("patient_id,minute,label\na,1,1\n", "no column 'time'"),
        ("patient_id,time,label\na,noon,1\n", "row 1, column 'time': neither an ISO date nor a number of minutes"),
        ("patient_id,time,label\na,,1\n", "row 1 has no time"),
        ("", "cannot be read"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"1\.csv: .*{message}"):
        read_labels(
            write(tmp_path / "1.csv", text), LabelColumns(time="time" if "minute" in text or "time" in text else None)
        )


@pytest.mark.parametrize(
    ("column", "labels", "given", "kind", "classes", "expected"),
    [
        ("label", ["1", "0", ""], "auto", "binary", ("0", "1"), [1, 0, None]),
        ("label", ["sick", " well ", ""], "auto", "multiclass", ("sick", "well"), [0, 1, None]),
        ("label", ["10", "9.0", "-1"], "multiclass", "multiclass", ("9", "10"), [1, 0, None]),
        ("label", ["2", "b", "10"], "multiclass", "multiclass", ("2", "10", "b"), [0, 2, 1]),
        ("label", ["1", "0", "nan"], "multiclass", "multiclass", ("0", "1"), [1, 0, None]),
        ("label", ["1.5", "-1", ""], "regression", "regression", (), [1.5, -1.0, None]),
        ("label", ["1.5", "-1", ""], "auto", "regression", (), [1.5, -1.0, None]),
        ("Length_of_stay", ["5", "-1", "0"], "regression", "regression", (), [5.0, None, 0.0]),
        ("float_value", ["5", "-1", "0"], "auto", "regression", (), [5.0, -1.0, 0.0]),
        ("label", ["", "", ""], "auto", "binary", ("0", "1"), [None, None, None]),
    ],
)
def test_the_kind_of_a_task_is_given_or_seen(
    tmp_path: Path,
    column: str,
    labels: list[str],
    given: LabelKind,
    kind: str,
    classes: tuple[str, ...],
    expected: object,
    tabulate: Tabulate,
) -> None:
    rows = "".join(f"{patient},{label}\n" for patient, label in zip("abc", labels, strict=True))
    found = read_labels(
        write(tmp_path / "1.csv", f"patient_id,{column}\n{rows}"), LabelColumns(label=column, kind=given)
    )
    assert (found.kind, found.classes) == (kind, classes)
    assert tabulate(found)["label"].to_list() == expected
    assert tabulate(found)["label"].dtype == {"binary": pl.Int8, "multiclass": pl.Int32, "regression": pl.Float64}[kind]


def test_labels_between_0_and_1_are_soft_where_they_are_said_to_be_binary(tmp_path: Path, tabulate: Tabulate) -> None:
    path = write(tmp_path / "1.csv", "patient_id,label\na,0.25\nb,-1\nc,1\nd,\n")
    assert read_labels(path).kind == "regression"
    found = read_labels(path, LabelColumns(kind="binary"))
    assert found.is_soft
    assert tabulate(found)["label"].to_list() == [0.25, None, 1.0, None]
    assert tabulate(found)["label"].dtype == pl.Float32
    path.write_text("patient_id,label\na,0.25\nb,1.01\n")
    with pytest.raises(UserError, match="row 2, column 'label': a label is 0, 1, a probability between them"):
        read_labels(path, LabelColumns(kind="binary"))


def test_classes_do_not_depend_on_the_type_in_which_a_file_has_them(tmp_path: Path, tabulate: Tabulate) -> None:
    pl.DataFrame({"patient_id": ["a", "b"], "label": [2, 0]}).write_parquet(tmp_path / "1.parquet")
    pl.DataFrame({"patient_id": ["c", "d"], "label": [2.0, None]}).write_parquet(tmp_path / "2.parquet")
    pl.DataFrame({"patient_id": ["e"], "label": ["02x"]}).write_parquet(tmp_path / "3.parquet")
    found = read_labels(tmp_path, LabelColumns(kind="multiclass"))
    assert found.classes == ("0", "2", "02x")
    assert tabulate(found)["label"].to_list() == [1, 0, 1, None, 2]


@pytest.mark.parametrize(
    ("kind", "labels", "expected"),
    [
        ("binary", ["1", "0"], [1, 0]),
        ("multiclass", ["mild", "severe"], [0, 1]),
        ("regression", ["1.5", "-1"], [1.5, -1.0]),
    ],
)
@pytest.mark.parametrize("is_csv", [True, False])
def test_words_that_mean_missing_are_no_labels_and_are_said(
    tmp_path: Path, kind: str, labels: list[str], expected: list[float], is_csv: bool, tabulate: Tabulate
) -> None:
    words = ["NA", "n/a", " null", "NULL", "NaN", "None", "<NA>", "NaT", "\\N", ""]
    frame = pl.DataFrame({"patient_id": list("abcdefghijkl"), "label": labels + words})
    path = tmp_path / ("1.csv" if is_csv else "1.parquet")
    (frame.write_csv if is_csv else frame.write_parquet)(path)
    found = read_labels(path)
    assert (found.kind, tabulate(found)["label"].to_list()) == (kind, expected + [None] * 10)
    (warning,) = found.warnings
    said = "'<na>' 1, '\\\\n' 1, 'n/a' 1, 'na' 1, 'nan' 1, 'nat' 1, 'none' 1, 'null' 2"
    assert warning.startswith(f"column 'label' has words that mean missing, so these samples are unlabelled: {said};")


def test_a_word_is_a_class_where_it_is_named(tmp_path: Path, tabulate: Tabulate) -> None:
    path = write(tmp_path / "1.csv", "patient_id,label\na,none\nb,mild\nc,NA\nd,\n")
    found = read_labels(path, LabelColumns(kind="multiclass", classes=("mild", "worse")))
    assert tabulate(found)["label"].to_list() == [None, 0, None, None]
    found = read_labels(path, LabelColumns(classes=("none", "mild")))
    assert tabulate(found)["label"].to_list() == [0, 1, None, None]
    assert "unlabelled: 'na' 1;" in found.warnings[0]
    path.write_text("patient_id,label\na,None\nb,mild\n")  # none is a class, so this is another one
    with pytest.raises(UserError, match="not in --label_classes"):
        read_labels(path, LabelColumns(classes=("none", "mild")))
    frame = pl.DataFrame({"patient_id": ["a", "b"], "label": [float("nan"), 1.0]})  # never a word
    frame.write_parquet(tmp_path / "1.parquet")
    found = read_labels(tmp_path / "1.parquet", LabelColumns(classes=("nan", "1")))
    assert (tabulate(found)["label"].to_list(), found.warnings) == ([None, 1], ())


def test_a_column_of_words_that_mean_missing_is_passed_over(tmp_path: Path, tabulate: Tabulate) -> None:
    path = write(tmp_path / "1.csv", "subject_id,boolean_value,integer_value\n1,NA,1\n2,,0\n")
    assert tabulate(read_labels(path)).rows() == [("1", 1), ("2", 0)]


def test_classes_may_be_more_than_occur_but_not_less(tmp_path: Path, tabulate: Tabulate) -> None:
    path = write(tmp_path / "1.csv", "patient_id,label\na,low\nb,\nc,high\n")
    found = read_labels(path, LabelColumns(classes=("low", "middle", "high")))
    assert (found.kind, found.classes) == ("multiclass", ("low", "middle", "high"))
    assert tabulate(found)["label"].to_list() == [0, None, 2]
    with pytest.raises(UserError, match="'label' has labels that are not in --label_classes"):
        read_labels(path, LabelColumns(classes=("low", "middle")))


@pytest.mark.parametrize("label", ["x", "inf", "1e400", "1e39"])
def test_a_number_that_is_none_is_named(tmp_path: Path, label: str) -> None:
    path = write(tmp_path / "1.csv", f"patient_id,label\na,1\nb,{label}\n")
    with pytest.raises(UserError, match=r"1\.csv: row 2, column 'label': a label is a number, or empty") as error:
        read_labels(path, LabelColumns(kind="regression"))
    assert label not in str(error.value).split("label", 2)[2]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.csv", tmp_path / "no.parquet"):
        with pytest.raises(UserError, match=r"no\.(csv|parquet): no such file"):
            read_labels(path)


def test_prediction_times_are_dates_or_minutes(tmp_path: Path, tabulate: Tabulate) -> None:
    text = "stay_id,prediction_time,label\n2,2150-01-01T01:00:00+01:00,1\n1,2150-01-02 12:30,0\n1,2150-01-01,0\n"
    labels = read_labels(write(tmp_path / "1.csv", text))
    assert labels.time_column == "prediction_time"
    assert tabulate(labels).select("patient_id", "prediction_time", "label").rows() == [
        ("1", datetime(2150, 1, 1), 0),
        ("1", datetime(2150, 1, 2, 12, 30), 0),
        ("2", datetime(2150, 1, 1), 1),
    ]
    labels = read_labels(write(tmp_path / "2.csv", "ts_id,hour,label\n1,90,1\n1,-3.5,0\n"), LabelColumns(time="hour"))
    assert labels.time_column == "prediction_minute"
    assert tabulate(labels).select("prediction_minute", "label").rows() == [(-3.5, 0), (90.0, 1)]


def test_a_column_of_labels_without_any_is_passed_over(tmp_path: Path, tabulate: Tabulate) -> None:
    frame = pl.DataFrame({"subject_id": [1, 2], "boolean_value": [None, None], "integer_value": [0, 1]})
    frame.write_parquet(tmp_path / "1.parquet")
    assert tabulate(read_labels(tmp_path / "1.parquet")).rows() == [("1", 0), ("2", 1)]


def test_the_files_of_a_folder_are_one_task(tmp_path: Path, tabulate: Tabulate) -> None:
    for name, patient in (("a", 1), ("sub/b", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pl.DataFrame({"subject_id": [patient], "boolean_value": [True]}).write_parquet(tmp_path / f"{name}.parquet")
    assert tabulate(read_labels(tmp_path)).rows() == [("1", 1), ("2", 1)]
    pl.DataFrame({"subject_id": [3], "boolean_value": [True], "prediction_minute": [1.0]}).write_parquet(
        tmp_path / "c.parquet"
    )
    with pytest.raises(UserError, match="other columns of times"):
        read_labels(tmp_path)


def test_labels_of_meds_may_be_csv_files(tmp_path: Path, tabulate: Tabulate) -> None:
    header = "subject_id,prediction_time,boolean_value,integer_value,float_value,categorical_value\n"
    write(tmp_path / "0.csv", header + "1,2150-01-01T00:00:00,True,,,\n")
    (tmp_path / "1.csv.gz").write_bytes(gzip.compress((header + "2,2150-01-01 05:00:00.000000,False,,,\n").encode()))
    write(tmp_path / "._0.csv", "no labels")
    assert tabulate(read_labels(tmp_path)).select("patient_id", "prediction_time", "label").rows() == [
        ("1", datetime(2150, 1, 1), 1),
        ("2", datetime(2150, 1, 1, 5), 0),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Parquet or CSV files here"):
        read_labels(tmp_path / "empty")


@pytest.mark.parametrize(
    "ids", [pa.array([b"1", b"2"]), pa.array(["1", "2"]).dictionary_encode(), pa.array([1.0, 2.0])]
)
@pytest.mark.parametrize("labels", [pa.array([Decimal("1.0"), Decimal("0.0")]), pa.array([b"1", b"0"])])
def test_labels_of_every_type(tmp_path: Path, ids: pa.Array, labels: pa.Array, tabulate: Tabulate) -> None:
    times = pa.array([datetime(2150, 1, 1)] * 2, pa.timestamp("ns", "UTC"))
    table = pa.table({"subject_id": ids, "prediction_time": times, "label": labels, "lists": [[1], [2]]})
    pq.write_table(table, tmp_path / "1.parquet", use_deprecated_int96_timestamps=True)
    time = datetime(2150, 1, 1)
    assert tabulate(read_labels(tmp_path / "1.parquet")).rows() == [("1", time, 1), ("2", time, 0)]


def test_the_patient_of_a_label_is_that_of_the_events(tmp_path: Path, tabulate: Tabulate) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "labels.csv", "subject_id,hadm_id,stay_id,label\n1,2,3,1\n")
    for source, patient in ((Table(path=tmp_path, labels=path), "3"), (Meds(path=tmp_path, labels=path), "1")):
        labels = source.read_labels()
        assert labels is not None
        assert tabulate(labels).rows() == [(patient, 1)]
