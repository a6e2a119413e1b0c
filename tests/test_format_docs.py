"""The examples of docs/format.md are run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import preprocess
from pipeline.dataset.schemas import INDEX_SCHEMA, SHARD_SCHEMA, TASK_SCHEMA, VOCABULARY_SCHEMA
from pipeline.prepare.clean import REJECTS_SCHEMA
from pipeline.schema import FORMAT_VERSION
from tests.conftest import closing_files

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    assert (
        preprocess.main(
            ["synthetic", "--num_patients", "30", "--shard_format", "both", "--output", str(folder / "DATA")]
        )
        == 0
    )
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=["pandas", "polars", "duckdb", "webdataset"])
def test_an_example_runs_and_gives_events(prepared: Path, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    monkeypatch.chdir(prepared)
    names: dict[str, Any] = {}
    with closing_files():
        exec(example, names)
    assert len(names["events"]) > 100


def words(dtype: pa.DataType) -> str:
    """A dtype as the page says it."""
    if pa.types.is_list(dtype):
        return f"list of {words(dtype.value_type)}"
    return {"float": "float32", "double": "float64"}.get(str(dtype), str(dtype))


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("Shards", SHARD_SCHEMA),
        ("index.parquet", INDEX_SCHEMA),
        ("tasks/NAME.parquet", TASK_SCHEMA),
        ("vocabulary.parquet", VOCABULARY_SCHEMA),
        ("rejects.parquet", REJECTS_SCHEMA),
    ],
)
def test_every_column_is_there_with_its_dtype_and_whether_it_may_be_null(heading: str, schema: pa.Schema) -> None:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    said = {}
    for names, dtype, text in re.findall(
        r"^\| (`.*?`) \| ([a-z][a-z0-9 \[\]]*) \| (.*) \|$", section, flags=re.MULTILINE
    ):
        said |= dict.fromkeys(re.findall(r"`(\w+)`", names), (dtype, "null" in text))

    def may_be_null(field: pa.Field) -> bool:
        return field.nullable or (pa.types.is_list(field.type) and field.type.value_field.nullable)

    assert said == {field.name: (words(field.type), may_be_null(field)) for field in schema}


def test_every_key_and_file_is_named(prepared: Path) -> None:
    data = prepared / "DATA"
    for name in ("summary.json", "manifest.json"):
        section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert set(json.loads((data / name).read_text())) - set(re.findall(r"`(\w+)`", section)) == set()
    assert f"`FORMAT_VERSION` is {FORMAT_VERSION}" in PAGE
    for path in data.iterdir():
        assert path.is_dir() or f"DATA/{path.name}" in PAGE
