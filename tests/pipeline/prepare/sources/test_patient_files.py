from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.prepare.clean import clean
from pipeline.prepare.known_splits import write_known_splits
from pipeline.prepare.options import BuildOptions
from pipeline.prepare.sources.patient_files import PatientFiles
from pipeline.schema import UserError
from tests.pipeline.prepare.sources.conftest import Tabulate


def write(folder: Path, files: dict[str, dict[str, list[Any]]]) -> PatientFiles:
    for name, columns in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        pl.DataFrame(columns, strict=False).write_parquet(folder / name)
    return PatientFiles(path=folder)


def events(**changes: list[Any]) -> dict[str, list[Any]]:
    return {"variable": ["HR", "RR"], "value": [80.0, None], "minute": [0.5, 1.0]} | changes


def test_files_of_all_splits(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {
            "train/200001.0.parquet": events(extra=["x", "y"]),
            "train/200002.parquet": events(value=[1, 2], minute=[3, 4]),  # whole numbers
            "valid/a b.parquet": events(value=["7", "x"]),  # text
            "test/200003.0.parquet": {"variable": [], "value": [], "minute": []},  # nothing
        },
    )
    (piece,) = source.pieces()
    parts = list(source.read(piece))
    cleaned = [clean(raw) for raw in parts]
    rejected = pl.concat(rejected for _, rejected in cleaned)
    assert sorted(
        (piece.files[row[0]], *row[1:])
        for kept, _ in cleaned
        for row in kept.select("file", "row", "patient_id", "minute", "variable", "value").rows()
    ) == [
        ("train/200001.0.parquet", 1, "200001", 0.5, "HR", 80.0),
        ("train/200001.0.parquet", 2, "200001", 1.0, "RR", None),
        ("train/200002.parquet", 1, "200002", 3.0, "HR", 1.0),
        ("train/200002.parquet", 2, "200002", 4.0, "RR", 2.0),
        ("valid/a b.parquet", 1, "a b", 0.5, "HR", 7.0),
    ]
    assert rejected.select("reason", "row", "patient_id", "value").rows() == [("bad_value", 2, "a b", "x")]
    assert {patient for raw in parts for patient in raw.patients} == {"200001", "200002", "200003", "a b"}
    (splits,) = source.read_splits().read()
    assert dict(splits.iter_rows()) == {"200001": "train", "200002": "train", "a b": "valid", "200003": "test"}


def test_files_beside_the_folders_are_found(tmp_path: Path, tabulate: Tabulate) -> None:
    source = write(tmp_path / "data", {"train/1.parquet": events()})
    assert source.read_labels() is None
    assert set(source.find_side_files().values()) == {None}
    (tmp_path / "data" / "oc.csv").write_text("ts_id,in_hospital_mortality\n1.0,1\n2.0,0.0\n3,\n")
    (tmp_path / "data" / "stats.csv").write_text("variable,mean,std\n")
    (tmp_path / "cached.csv").write_text("Key,0\n")
    labels = source.read_labels()
    assert labels is not None
    assert Path(labels.origin).name == "oc.csv"
    assert tabulate(labels).rows() == [("1", 1), ("2", 0), ("3", None)]
    assert source.find_side_files()["statistics"] == tmp_path / "data" / "stats.csv"
    assert source.find_side_files()["embeddings"] == tmp_path / "cached.csv"
    assert len(source.inputs()) == 4
    given = PatientFiles(path=tmp_path / "data", embeddings=tmp_path / "other.csv")
    assert given.find_side_files()["embeddings"] == tmp_path / "other.csv"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/1.parquet": {"variable": ["HR"], "minute": [0.0]}}, r"1\.parquet: no column 'value'"),
        ({"train/1.parquet": events(value=[[1.0], [2.0]])}, r"1\.parquet: column 'value' holds large_list"),
        ({"train/1.0.parquet": events(), "test/1.parquet": events()}, "patient number 1 of test is in train too"),
        ({"training/1.parquet": events()}, "no {train,valid,test}"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path: Path, files: dict[str, dict[str, list[Any]]], message: str) -> None:
    source = write(tmp_path, files)

    def read_all() -> None:
        for piece in source.pieces():
            write_known_splits(source.read_splits(), BuildOptions(), tmp_path)
            list(source.read(piece))

    with pytest.raises(UserError, match=message):
        read_all()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, {"train/1.parquet": events()})
    (tmp_path / "train" / "1.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"1\.parquet: cannot be read"):
        list(source.read(source.pieces()[0]))
